"""Running a sweep: what is not stored yet, scene by scene, each with one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.config import SweepConfig, check_engine, read_checked
from tokenprune.sweeps.data_check import Data, warned_once
from tokenprune.sweeps.engines import Engine, LocalEngine, Task
from tokenprune.sweeps.entries import DatasetEntry
from tokenprune.sweeps.group_run import GroupRun, queries_of
from tokenprune.sweeps.plan import Group, groups_of
from tokenprune.sweeps.results import reasons_of
from tokenprune.sweeps.store import LISTING, Store, writing
from tokenprune.utils.arguments import instance, shown
from tokenprune.utils.threads import ThreadChoice, using


@dataclass(frozen=True)
class Progress:
    """How far a sweep is, in records: queries times configurations.

    Attributes:
        group: model and dataset under way.
        done, total: records of the group; total None = not known.
        all_done, all_total: those of all groups.
        groups: how many there are.
    """

    group: str
    done: int
    total: int | None
    all_done: int
    all_total: int | None
    groups: int


@dataclass
class Swept:
    """The result of `sweep`.

    Attributes:
        folder: of the store; `tokenprune.read_results` reads it.
        records: in it.
        added: of them, by this call.
        ran: configurations of the last call that have records.
        reasons: why configurations could not run, by "strategy, model on dataset (split, protocol)".
        answers: in the store beside the records; see `tokenprune.read_answers`.
        added_answers: of them, by this call.
    """

    folder: Path
    records: int = 0
    added: int = 0
    ran: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    answers: int = 0
    added_answers: int = 0


def sweep(
    config: SweepConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    shard: tuple[int, int] | None = None,
    keep_masks: bool = True,
    accept_changes: bool = False,
    progress: Callable[[Progress], None] | None = None,
    threads: int | ThreadChoice | None = None,
    engine: str | Engine = "local",
) -> Swept:
    """Run every strategy of a configuration on every query, and store a record of each.

    The same call on the same folder goes on from what is stored, whenever and however the call before ended. A
    configuration may grow meanwhile (more strategies, budgets, seeds, a higher limit): what is stored is not run again.

    Args:
        config: a YAML or JSON file, a mapping, or a `SweepConfig`.
        out: folder of the store.
        shard: (i, n): only every n-th scene, from the i-th, counted from 1; see `merge`.
        keep_masks: whether to store masks and kept tokens, for galleries.
        accept_changes: whether to go on where the code or the weights are not those of the stored records.
        progress: called after every scene.
        threads: processor threads, set for the whole process; None = unchanged.
        engine: "local" runs in this process, "ray" on the devices of a Ray cluster; or a
            `tokenprune.sweeps.ray_engine.RayEngine` with options.

    Raises:
        OptionError: everything that is wrong in the configuration, at once, before a model is loaded; or a shard that
            is none.
        InputError: another process writes to the folder, or it holds something else; data cannot be read; code,
            weights or data are not those of the stored records.
        CheckpointError: a model cannot be loaded.
        UnknownNameError: there is no such engine.

    Examples:
        >>> import tempfile, tokenprune as tp
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"], "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, again = tp.sweep(config, folder).added, tp.sweep(config, folder).added
        >>> first, again
        (4, 0)
    """
    checked, made = read_checked(config)
    for name, flag in (("keep_masks", keep_masks), ("accept_changes", accept_changes)):
        instance(name, flag, bool, "True or False")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress={shown(progress)} found, expected a function of a Progress")
    part = _checked_shard(shard)
    groups = groups_of(checked)
    with writing(out) as store, using(threads), engine_of(engine, threads) as running, warned_once():
        refuse_tuning(store, out)
        _check_same_shard(store, part, out)
        data = {entry: Data(entry, made[entry]) for entry in checked.datasets}
        for group in groups:
            data[group.dataset].check(store, group, checked.limit)
        with store.transaction():
            store.set_meta(config=checked.model_dump(mode="json"), shard=part)
            store.set_meta(planned=[one.hash for group in groups for one in group.configurations])
            store.set_meta(**{f"{LISTING}{group.data}": data[group.dataset].listing for group in groups})
            for group in groups:
                for one in group.configurations:
                    store.add_configuration(one, group.source)
        found = Swept(store.folder)
        expected = _expected(groups, data, checked.limit, part)
        runs = [
            GroupRun(store, group, data[group.dataset], expected[group.dataset], part, accept_changes)
            for group in groups
        ]
        for place, run in enumerate(runs):
            task = Task(checked, place, run.group, keep_masks, run.pending, data[run.group.dataset].dataset)
            for added in _run_group(run, running, task):
                found.added += added
                if progress is not None:
                    progress(_progress(run, runs))
        found.records, found.answers = store.count(), store.count("answers")
        found.ran = sum(bool(store.done(one.hash)) for group in groups for one in group.configurations)
        found.reasons = reasons_of(store, [one.hash for group in groups for one in group.configurations])
    return found


def _run_group(run: GroupRun, engine: Engine, task: Task) -> Iterator[int]:
    """Store what an engine gives of a group; yields the number of records of each scene."""
    ran = False
    with closing(engine.run(task)) as scenes:
        for scene in scenes:
            ran = True
            yield run.add(scene)
            if len(run.failed) == len(task.group.configurations):
                break
    if not run.seen:
        entry = task.group.dataset
        raise InputError(f"dataset {entry.label!r}, split {entry.split!r}: no query found; choose another split")
    run.finish()
    if ran:
        yield 0  # for the progress: nothing more comes


def _expected(
    groups: list[Group], data: Mapping[DatasetEntry, Data], limit: int | None, shard: tuple[int, int]
) -> dict[DatasetEntry, int | None]:
    first = {group.dataset: group for group in reversed(groups)}
    return {entry: queries_of(group, data[entry], limit, shard) for entry, group in first.items()}


def _progress(run: GroupRun, runs: list[GroupRun]) -> Progress:
    totals = [one.total for one in runs]
    known = [total for total in totals if total is not None]
    everything = sum(known) if len(known) == len(totals) else None
    return Progress(run.group.label, run.done, run.total, sum(one.done for one in runs), everything, len(runs))


def _checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        return (1, 1)
    number, count = shard if isinstance(shard, (tuple, list)) and len(shard) == 2 else (0, 0)
    if not (isinstance(number, int) and isinstance(count, int) and 1 <= number <= count):
        raise OptionError(f"shard={shown(shard)} found, expected (i, n) with i from 1 to n, such as (1, 4)")
    return (number, count)


def refuse_tuning(store: Store, folder: str | Path) -> None:
    """Raises InputError for the store of a search, whose plan a sweep would replace."""
    if "tuning" in store.meta():
        raise InputError(f"{str(folder)!r} holds a search of `tune`, not a sweep; give another folder")


def _check_same_shard(store: Store, shard: tuple[int, int], out: str | Path) -> None:
    before = store.meta().get("shard")
    if before is not None and tuple(before) != shard:
        found = "/".join(map(str, before))
        raise InputError(f"{str(out)!r} holds shard {found}; give each shard a folder of its own, then merge them")


def engine_of(engine: str | Engine, threads: int | ThreadChoice | None = None) -> Engine:
    """An engine by name; threads are those of its processes. Raises UnknownNameError for another one."""
    if not isinstance(engine, str):
        if isinstance(engine, type) or not all(hasattr(engine, name) for name in ("run", "__enter__", "__exit__")):
            raise OptionError(f"engine={shown(engine)} found, expected 'local', 'ray' or a RayEngine")
        return engine
    check_engine(engine)
    if engine == "local":
        return LocalEngine()
    from tokenprune.sweeps.ray_engine import RayEngine

    return RayEngine(threads=threads.count if isinstance(threads, ThreadChoice) else threads)
