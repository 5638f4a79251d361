"""Running a sweep: what is not stored yet, scene by scene, each with one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.datasets.base import Dataset
from tokenprune.datasets.files.dataset import FileDataset
from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.config import SweepConfig, read_config
from tokenprune.sweeps.fingerprint import of_scene, same_scene
from tokenprune.sweeps.plan import Group, groups_of
from tokenprune.sweeps.store import Store, row_of, writing
from tokenprune.sweeps.worker import SceneRecords, Worker, environment_hash
from tokenprune.utils.threads import ThreadChoice, using

CHANGES = {"code": "the code", "weights": "the weights"}


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        group: model and dataset under way.
        done, total: queries of the group that are stored for all its configurations; total None = not known.
        groups_done, groups: of the sweep.
    """

    group: str
    done: int
    total: int | None
    groups_done: int
    groups: int


@dataclass
class Swept:
    """The result of `sweep`.

    Attributes:
        folder: of the store; `tokenprune.read_results` reads it.
        records: in it.
        added: of them, by this call.
        reasons: why configurations could not run, by their labels.
    """

    folder: Path
    records: int = 0
    added: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


def sweep(
    config: SweepConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    shard: tuple[int, int] | None = None,
    keep_masks: bool = True,
    accept_changes: bool = False,
    progress: Callable[[Progress], None] | None = None,
    threads: int | ThreadChoice | None = None,
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

    Raises:
        OptionError: everything that is wrong in the configuration, at once, before a model is loaded; or a shard that
            is none.
        InputError: another process writes to the folder, or it holds something else; data cannot be read; code,
            weights or data are not those of the stored records.
        CheckpointError: a model cannot be loaded.

    Example:
        >>> import tempfile, tokenprune as tp
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"], "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, again = tp.sweep(config, folder).added, tp.sweep(config, folder).added
        >>> first, again
        (4, 0)
    """
    checked = read_config(config)
    part = _checked_shard(shard)
    groups = groups_of(checked)
    with writing(out) as store, using(threads):
        with store.transaction():
            _check_same_shard(store, part, out)
            store.set_meta(config=checked.model_dump(mode="json"), shard=part)
            store.set_meta(planned=[one.hash for group in groups for one in group.configurations])
            for group in groups:
                for one in group.configurations:
                    store.add_configuration(one)
                    store.set_configuration(one.hash, reason=None)
        found = Swept(store.folder)
        for number, group in enumerate(groups):
            worker = Worker(group, checked.limit, keep_masks=keep_masks)
            for scene, stored in run_group(store, worker, group, part, accept_changes):
                found.added += stored
                if progress is not None:
                    progress(Progress(group.label, *scene, number, len(groups)))
        found.records = store.count()
        planned = {one.hash for group in groups for one in group.configurations}
        reasons = store.rows("SELECT hash, label, reason FROM configurations WHERE reason IS NOT NULL")
        found.reasons = {label: reason for hashed, label, reason in reasons if hashed in planned}
    return found


def run_group(
    store: Store,
    worker: Worker,
    group: Group,
    shard: tuple[int, int] = (1, 1),
    accept_changes: bool = False,
) -> Iterator[tuple[tuple[int, int | None], int]]:
    """Run what is missing of a group; after every scene yields (queries done, in all), and the records added.

    Args:
        store: open for writing, with the group's configurations.
        worker: of the group, or of one with the same model, dataset and seed.
        group: what to run.
        shard, accept_changes: as for `sweep`.

    Raises:
        InputError: see `sweep`.
    """
    done = {one.hash: store.done(one.hash) for one in group.configurations}
    known = store.scenes(group.source)
    total = queries_of(worker.data, group.dataset.split, worker.limit)
    behind = 0  # queries of scenes that need no run

    def lacks(hashed: str, number: int, queries: int) -> bool:
        return done[hashed].get(number, 0) < len(worker.asked(number, queries))

    def wanted(number: int, queries: int) -> bool:
        nonlocal behind
        missing = number % shard[1] == shard[0] - 1 and any(lacks(one, number, queries) for one in done)
        behind += 0 if missing else queries
        return missing

    env = ""
    for number, scene in worker.scenes(wanted):
        if not env:
            env = _check_environment(store, worker, group, known, accept_changes)
        queries = len(scene.queries)
        left = [one for one in group.configurations if one.hash not in worker.failed]
        pending = [one for one in left if lacks(one.hash, number, queries)]
        found = worker.run(number, scene, pending)
        _check_data(group, known, found)
        with store.transaction():
            stored = add(store, group, found, env)
        behind += queries
        yield (behind, total), stored
        if all(one.hash in worker.failed for one in group.configurations):
            return


def add(store: Store, group: Group, found: SceneRecords, environment: str) -> int:
    """Store what a worker found in one scene; inside a transaction. Returns the number of records."""
    rows = [
        row_of(hashed, record, found.name, found.digest, found.texts[record.query], found.size, environment)
        for hashed, records in found.records.items()
        for record in records
    ]
    store.add_records(rows)
    store.add_scene(group.source, found.number, found.name, found.digest, len(found.texts))
    for hashed, options in found.options.items():
        store.set_configuration(hashed, options=options, policies=found.policies[hashed])
    for hashed, reason in found.reasons.items():
        store.set_configuration(hashed, reason=reason)
    return len(rows)


def queries_of(data: Dataset, split: str, limit: int | None) -> int | None:
    """How many queries a split has, up to the limit; None where that is only known at its end."""
    if not isinstance(data, FileDataset):
        return limit
    return sum(len(scene.queries) for scene in data.selected(split, limit))


def _check_environment(
    store: Store, worker: Worker, group: Group, known: Mapping[int, str], accept_changes: bool
) -> str:
    """The hash of the environment, stored. Raises InputError if code, weights or data have changed since."""
    now = worker.environment()
    model = group.model.label
    before: dict[str, Any] = store.meta().get(f"digests of {model}", {})
    changed = [what for name, what in CHANGES.items() if before.get(name, now[name]) != now[name]]
    if changed and not accept_changes:
        raise InputError(
            f"{str(store.folder)!r}: {' and '.join(changed)} changed since the records of {model!r} were made, so new "
            "ones would not be comparable; start a new folder, or go on with accept_changes=True (--accept-changes): "
            "every record tells what it was made with"
        )
    if 0 in known:
        first = worker.first()
        if not same_scene(of_scene(first), known[0]):
            raise _changed_data(group, first.id)
    hashed = environment_hash(now)
    with store.transaction():
        store.add_environment(hashed, now)
        store.set_meta(**{f"digests of {model}": {name: now[name] for name in CHANGES}})
    return hashed


def _check_data(group: Group, known: Mapping[int, str], found: SceneRecords) -> None:
    if not same_scene(known.get(found.number, found.digest), found.digest):
        raise _changed_data(group, found.name)


def _changed_data(group: Group, name: str) -> InputError:
    return InputError(
        f"scene {name!r} of {group.dataset.label} is not the one that was run before: image, queries or targets "
        "changed; start a new folder"
    )


def _checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        return (1, 1)
    number, count = shard if isinstance(shard, (tuple, list)) and len(shard) == 2 else (0, 0)
    if not (isinstance(number, int) and isinstance(count, int) and 1 <= number <= count):
        raise OptionError(f"shard={shard!r} found, expected (i, n) with i from 1 to n, such as (1, 4)")
    return (number, count)


def _check_same_shard(store: Store, shard: tuple[int, int], out: str | Path) -> None:
    before = store.meta().get("shard")
    if before is not None and tuple(before) != shard:
        found = "/".join(map(str, before))
        raise InputError(f"{str(out)!r} holds shard {found}; give each shard a folder of its own, then merge them")
