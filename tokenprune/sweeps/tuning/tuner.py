"""Tuning: search the options of a strategy under a budget on one split, and confirm the best on another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune import api
from tokenprune.core.budget import checked_budget
from tokenprune.core.by_name import parse_text
from tokenprune.errors import InputError, OptionError
from tokenprune.evaluation.contenders import Contender
from tokenprune.sweeps.config import MAX_SEED, SweepConfig, read_config
from tokenprune.sweeps.data_check import Data, warned_once
from tokenprune.sweeps.entries import DatasetEntry, ModelEntry
from tokenprune.sweeps.fingerprint import image_of
from tokenprune.sweeps.group_run import GroupRun, queries_of
from tokenprune.sweeps.plan import Configuration, Group, configuration_of
from tokenprune.sweeps.store import Store, writing
from tokenprune.sweeps.tuning.confirmation import DEFAULT, Row, rows_of
from tokenprune.sweeps.tuning.search import Outcome, Search, check_optuna, search
from tokenprune.sweeps.tuning.search_space import derived
from tokenprune.sweeps.tuning.search_text import parse_search
from tokenprune.sweeps.tuning.tuned import FILE, Tuned, as_json
from tokenprune.sweeps.worker import Models, Worker
from tokenprune.utils.arguments import shown, whole_number
from tokenprune.utils.files import replacing
from tokenprune.utils.threads import ThreadChoice, using

BEST = 3


@dataclass(frozen=True)
class Phase:
    """How far a tuning is.

    Attributes:
        name: "search" or "confirm".
        done, total: combinations that ran, or queries.
        best: the highest gIoU so far on the calibration split; None at the beginning.
    """

    name: str
    done: int
    total: int | None
    best: float | None = None


def tune(
    strategy: str,
    out: str | Path,
    *,
    budget: float,
    model: str | Mapping[str, Any] = "lisa-tiny",
    dataset: str | Mapping[str, Any] = "shapes",
    split: str = "train",
    confirm_split: str = "val",
    trials: int = 50,
    limit: int = 60,
    confirm_limit: int = 200,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    search_for: Iterable[str] = (),
    accept_changes: bool = False,
    progress: Callable[[Phase], None] | None = None,
    threads: int | ThreadChoice | None = None,
) -> Tuned:
    """Search the options of a strategy, and confirm the best on queries that the search never saw.

    Every combination runs at the same budget. The three of highest gIoU on `split` run on `confirm_split`, beside the
    default (the strategy with `options` alone) and the untouched model. The same call on the same folder goes on from
    what is stored; `trials`, `limit` and `confirm_limit` may have grown meanwhile.

    Args:
        strategy: a name, with fixed options as in "csp:query=seg".
        out: folder of the store and of `tuning.json`.
        budget: share of the image tokens.
        model, dataset: as in a `SweepConfig`.
        split, confirm_split: two different ones of the dataset.
        trials: combinations to run; fewer, if there are not as many.
        limit, confirm_limit: queries of each split.
        seed: of the search, of datasets that draw at random and of strategies that do.
        options: fixed options, not searched.
        search_for: values of options, as `key=lo..hi` or `key=a,b,c`; of the others they are derived.
        accept_changes: see `sweep`.
        progress: called after every batch of the search and every scene of the confirmation.
        threads: processor threads, set for the whole process; None = unchanged.

    Raises:
        OptionError: an argument that is impossible; nothing to search.
        BudgetError: the strategy takes no budget, or no combination can meet it.
        InputError: optuna is not installed; the folder holds something else; the splits share a scene.
        CheckpointError: the model cannot be loaded.

    Examples:
        >>> import tempfile
        >>> from tokenprune.sweeps.tuning import tune
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = tune("divprune", folder, budget=0.35, trials=4, limit=2, confirm_limit=2)
        >>> [row.name for row in found.rows]
        ['untouched', 'default', 'tuned 1', 'tuned 2']
    """
    check_optuna()
    name, fixed = _fixed(strategy, options or {})
    checked_budget("budget", budget)
    for key, value in (("trials", trials), ("limit", limit), ("confirm_limit", confirm_limit)):
        whole_number(key, value, 1)
    if whole_number("seed", seed, 0) > MAX_SEED:
        raise OptionError(f"seed: {shown(seed)} found, expected at most {MAX_SEED}")
    plain = api.strategy(name, **fixed)
    given = parse_search(plain, search_for)
    entry, data = _entries(model, dataset, split, confirm_split)
    what = {
        "strategy": name,
        "fixed": fixed,
        "budget": budget,
        "model": entry.model_dump(),
        "datasets": [one.model_dump() for one in data],
        "seed": seed,
        "search": {option: str(domain) for option, domain in given.items()},
    }
    default = Contender(api.strategy(name, budget, **fixed) if plain.takes_budget() else plain, fixed, budget)
    with writing(out) as store, using(threads), warned_once():
        _check_same(store, what, out)
        models = Models()
        calibration = _Runs(store, Group(entry, data[0], seed, ()), default, limit, accept_changes, models)
        shape = calibration.worker.shape()
        space = derived(plain, budget, shape, given)

        def told(now: Search) -> None:
            if progress is not None:
                best = max((one.giou for one in now.ran.values()), default=None)
                progress(Phase("search", len(now.ran), min(trials, space.size), best))

        (before,) = calibration.outcomes([default])
        found = search(plain, budget, shape, space, trials, seed, calibration.outcomes, told)
        names = {f"tuned {place}": number for place, number in enumerate(found.best(BEST), 1)}
        calibrated = {name: found.ran[number].giou for name, number in names.items()}
        if before.reason is None:
            calibrated[DEFAULT] = before.giou
        field = {"untouched": Contender(api.strategy("none")), DEFAULT: default}
        field |= {name: found.contenders[number] for name, number in names.items()}
        # the split is first read here
        confirm = _Runs(store, Group(entry, data[1], seed, ()), default, confirm_limit, accept_changes, models)
        rows = confirm.rows(field, calibrated, progress)
        _check_apart(store, calibration, confirm)
        result = Tuned(what, limit, confirm_limit, trials, space, found, rows)
        with replacing(store.folder / FILE) as path:
            path.write_text(as_json(result), encoding="utf-8")
    return result


def _fixed(strategy: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a strategy, and the options that are fixed."""
    name, fixed = parse_text(strategy)
    twice = sorted(fixed.keys() & options.keys())
    if twice:
        raise OptionError(f"strategy {name!r}: option {twice[0]!r} is given twice; give it once")
    if "budget" in {*fixed, *options}:
        raise OptionError(f"strategy {name!r}: a budget found among its options; give it as budget= (--budget)")
    return name, {**fixed, **options}


class _Runs:
    """Runs contenders on the queries of one split, those that are stored left out."""

    def __init__(
        self, store: Store, group: Group, default: Contender, limit: int, accept_changes: bool, models: Models
    ) -> None:
        entry = (group.model, group.dataset)
        self.group = Group(*entry, group.seed, (configuration_of(*entry, default, group.seed),))
        self.store, self._accept, self._data = store, accept_changes, Data(group.dataset)
        self._data.check(store, self.group, limit)
        self.worker = Worker(self.group, limit, keep_masks=False, models=models, data=self._data.dataset)
        self._asked: list[tuple[int, int]] | None = None

    def outcomes(self, contenders: Sequence[Contender]) -> list[Outcome]:
        """The IoUs of contenders that run side by side."""
        ones = [self._configuration(contender) for contender in contenders]
        self._run(ones, None)
        return [self._outcome(one) for one in ones]

    def rows(self, field: Mapping[str, Contender], calibrated: Mapping[str, float | None], progress: Any) -> list[Row]:
        """The confirmation of named contenders, one of them "default"."""
        ones = {name: self._configuration(contender) for name, contender in field.items()}
        self._run(list(ones.values()), progress)
        return rows_of(self.store, ones, calibrated, self.asked(), self.worker.failed)

    def asked(self) -> list[tuple[int, int]]:
        """(scene, query) of all queries."""
        if self._asked is None:
            found: list[tuple[int, int]] = []

            def count(number: int, queries: int) -> bool:
                found.extend((number, query) for query in self.group.asked(number, queries))
                return False

            for _ in self.worker.scenes(count):
                pass
            self._asked = found
        return self._asked

    def _configuration(self, contender: Contender) -> Configuration:
        return configuration_of(self.group.model, self.group.dataset, contender, self.group.seed)

    def _run(self, ones: list[Configuration], progress: Callable[[Phase], None] | None) -> None:
        store = self.store
        distinct = {one.hash: one for one in ones}
        with store.transaction():
            for one in distinct.values():
                store.add_configuration(one, self.group.source)
            planned = [*store.meta().get("planned", []), *distinct]
            store.set_meta(planned=list(dict.fromkeys(planned)))
        group = Group(self.group.model, self.group.dataset, self.group.seed, tuple(distinct.values()))
        total = None if progress is None else queries_of(group, self._data, self.worker.limit, (1, 1))
        run = GroupRun(store, group, self._data, total, (1, 1), self._accept)
        for number, scene in self.worker.scenes(lambda number, queries: bool(run.pending(number, queries))):
            run.add(self.worker.run(number, scene, run.pending(number, len(scene.queries))))
            if progress is not None:
                progress(Phase("confirm", run.done, run.total))

    def _outcome(self, one: Configuration) -> Outcome:
        if one.hash in self.worker.failed:
            return Outcome(reason=self.worker.failed[one.hash])
        rows = self.store.rows("SELECT scene, query, iou FROM records WHERE configuration = ?", (one.hash,))
        known = {(scene, query): iou for scene, query, iou in rows}
        return Outcome(tuple(known[place] for place in self.asked()))


def _entries(
    model: str | Mapping[str, Any], dataset: str | Mapping[str, Any], split: str, confirm_split: str
) -> tuple[ModelEntry, list[DatasetEntry]]:
    if split == confirm_split:
        raise OptionError(f"both splits are {split!r}; confirm on another one (confirm_split=, --confirm-split)")
    about: dict[str, Any] = {"name": dataset} if isinstance(dataset, str) else dict(dataset)
    entries = [{**about, "split": one} for one in (split, confirm_split)]
    checked: SweepConfig = read_config({"models": model, "datasets": entries, "strategies": "none"})
    return checked.models[0], list(checked.datasets)


def _check_same(store: Store, what: Mapping[str, Any], out: str | Path) -> None:
    """Store what is searched. Raises InputError if the folder holds a sweep or another search."""
    meta = store.meta()
    now: dict[str, Any] = json.loads(json.dumps(what, default=repr))
    before: dict[str, Any] | None = meta.get("tuning")
    if before is None:
        if meta:
            raise InputError(f"{str(out)!r} holds a sweep; give another folder")
        before = now
    for key, value in now.items():
        if before.get(key) != value:
            found, given = json.dumps(before.get(key)), json.dumps(value)
            raise InputError(f"{str(out)!r} holds a search with {key} {found}, not {given}; give another folder")
    with store.transaction():
        store.set_meta(tuning=now, shard=(1, 1))


def _check_apart(store: Store, calibration: _Runs, confirm: _Runs) -> None:
    """Raises InputError if an image of the confirmation was searched on."""
    seen = {image_of(digest) for digest in store.scenes(calibration.group.source).values()}
    for number, digest in store.scenes(confirm.group.source).items():
        if image_of(digest) in seen:
            raise InputError(
                f"scene {number} of split {confirm.group.dataset.split!r} has an image that is also in split "
                f"{calibration.group.dataset.split!r}, so it confirms nothing; choose splits without common images"
            )
