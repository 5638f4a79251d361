"""Runs scenes of one group: the part of a sweep that holds a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from tokenprune import api
from tokenprune.core.stage import Shape
from tokenprune.datasets.base import Dataset, Scene
from tokenprune.datasets.validation import numbered_scenes
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.evaluation import environment
from tokenprune.evaluation.accounting import head_flops, own_work, shape_of
from tokenprune.evaluation.measured import metrics_of
from tokenprune.evaluation.models import TurnTaking, check_model
from tokenprune.evaluation.records import Record
from tokenprune.evaluation.scene_run import SceneRun, sample_names
from tokenprune.plugins.attribution import brief
from tokenprune.sweeps import fingerprint
from tokenprune.sweeps.entries import ModelEntry
from tokenprune.sweeps.plan import SEED_STEP, Configuration, Group, digest
from tokenprune.sweeps.store import row_of
from tokenprune.utils.arguments import unicode_problem


@dataclass(frozen=True)
class Origin:
    """Where records come from.

    Attributes:
        hash: of the environment.
        environment: versions, machine, and digests of code and weights.
        digests: these two, that of the code by package; and whether the model asks the queries of a scene together, in
            one conversation.
        first: name and digest of the first scene of the split, as it is read there.
        where: for messages: " on node 10.0.0.3"; empty in this process.
    """

    hash: str
    environment: dict[str, Any]
    digests: dict[str, Any]
    first: tuple[str, str]
    where: str = ""


@dataclass
class SceneRecords:
    """What a worker gives back for one scene; plain data that can be sent to another process.

    Attributes:
        number, name, digest: of the scene.
        queries: how many it has.
        origin: where it was run.
        rows: of the store, a list by the hash of each configuration.
        options: that strategies ran with.
        policies: of strategies.
        reasons: why configurations could not run.
    """

    number: int
    name: str
    digest: str
    queries: int
    origin: Origin
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Models:
    """The model that was asked for last: groups in turn that share a model load it once."""

    def __init__(self) -> None:
        self._entry: ModelEntry | None = None
        self._model: Any = None

    def get(self, entry: ModelEntry) -> Any:
        """The model; another one is let go of first. Raises CheckpointError if it cannot be loaded."""
        if entry != self._entry:
            self._entry = self._model = None
            self._model = check_model(api.load(entry.source, **entry.options))
            self._entry = entry
        return self._model


class Worker:
    """Runs the configurations of one group on scenes, with a model that is loaded when the first scene comes.

    Args:
        group: what to run.
        limit: queries of the dataset; None = all.
        keep_masks: whether records hold masks and stages.
        models: gives the model.
        where: see `Origin`.
        data: the group's dataset, if it was made before.
    """

    def __init__(
        self,
        group: Group,
        limit: int | None = None,
        *,
        keep_masks: bool = True,
        models: Models,
        where: str = "",
        data: Dataset | None = None,
    ) -> None:
        self.group, self.limit, self._keep_masks = group, limit, keep_masks
        self._models, self._where = models, where
        self._data: Dataset = group.dataset.make() if data is None else data
        self._reader: Iterator[tuple[int, Scene]] = iter(())
        self._sought = self._read = -1
        self._measured: tuple[Any, dict[str, float]] | None = None
        self._own: dict[str, dict[str, float]] = {}  # FLOPs of a strategy's matmuls and of the mask head
        self._options: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def scenes(self, wanted: Callable[[int, int], bool]) -> Iterator[tuple[int, Scene]]:
        """See `numbered_scenes`."""
        return numbered_scenes(self._data, self.group.dataset.split, self.limit, self.group.seed, wanted)

    def scene(self, number: int) -> Scene:
        """One scene; those of a dataset that makes its scenes in turn are best asked for in their order.

        Raises:
            InputError: the dataset has fewer.
        """
        if number <= self._read or self._read < 0:
            self._reader = self.scenes(lambda found, queries: found == self._sought)
        self._sought = number
        found = next(self._reader, None)
        self._read = -1 if found is None else number
        if found is None:
            split = self.group.dataset.split
            raise InputError(f"dataset {self._data.name!r}, split {split!r} has no scene {number}{self._where}")
        return found[1]

    @cached_property
    def first(self) -> Scene:
        """The first scene of the split. Raises InputError if there is none."""
        found = next(self.scenes(lambda number, queries: number == 0), None)
        if found is None:
            raise InputError(f"dataset {self._data.name!r}, split {self.group.dataset.split!r} has no query")
        return found[1]

    @cached_property
    def model(self) -> Any:
        """The model, loaded on first use."""
        return self._models.get(self.group.model)

    @cached_property
    def origin(self) -> Origin:
        """See `Origin`."""
        strategies = [one.contender.strategy for one in self.group.configurations]
        code, weights = fingerprint.of_code(strategies), fingerprint.of_weights(self.model)
        found = {**environment.describe(self.model.decoder), "code": digest(code), "weights": weights}
        first = (self.first.id, fingerprint.of_scene(self.first))
        together = bool(getattr(self.model, "one_conversation", False))
        digests = {"code": code, "weights": weights, "together": together}
        return Origin(digest(found), found, digests, first, self._where)

    @torch.no_grad()
    def shape(self) -> Shape:
        """Layers of the model, and image and text tokens of the first query."""
        _, trace = self.model.run_decoder(self._first_query()[0], api.strategy("none"))
        return shape_of(trace.ledger, self._runner.spec.layers)

    @cached_property
    def _runner(self) -> SceneRun:
        return SceneRun(
            TurnTaking(self.model),
            protocol=self.group.dataset.protocol,
            added=metrics_of(None),
            keep_masks=self._keep_masks,
            seed=self.group.seed * SEED_STEP,
        )

    @torch.no_grad()
    def run(self, number: int, scene: Scene, configurations: Sequence[Configuration]) -> SceneRecords:
        """Run configurations on one scene. What cannot run is given back with the reason, and not tried again."""
        self._check_names(scene)
        found = SceneRecords(number, scene.id, fingerprint.of_scene(scene), len(scene.queries), self.origin)
        ready = {}
        for key, one in enumerate(configurations):
            if one.hash not in self.failed:
                self._attempt(one, partial(self._prepare, one))
            if one.hash not in self.failed:
                ready[key] = one
        contenders = {key: one.contender for key, one in ready.items()}
        result = self._runner.run(scene, number, contenders, lambda key, run: self._attempt(ready[key], run))
        for key, one in ready.items():
            if key in result.records and one.hash not in self.failed:  # all queries of the scene, or none
                records = (self._with_own(one, record) for record in result.records[key])
                found.rows[one.hash] = [
                    row_of(one.hash, record, scene, found.digest, found.origin.hash) for record in records
                ]
                found.options[one.hash] = self._options[one.hash]
                trace = next(answers[key].trace for _, answers in result.calls if key in answers)
                found.policies[one.hash] = {} if trace is None else dict(trace.policies)
        found.reasons = {one.hash: self.failed[one.hash] for one in configurations if one.hash in self.failed}
        return found

    def _check_names(self, scene: Scene) -> None:
        """Raises InputError for names that cannot be stored, such as those of files whose names are not Unicode."""
        for name in (scene.id, *sample_names(scene)):
            if problem := unicode_problem(name):
                raise InputError(f"dataset {self._data.name!r}: the name {name[:60]!a} {problem}")

    def _attempt(self, one: Configuration, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except InputError:
            raise
        except (TokenPruneError, torch.OutOfMemoryError) as error:
            self.failed[one.hash] = str(error) if isinstance(error, TokenPruneError) else brief(error)
            return None

    def _prepare(self, one: Configuration) -> None:
        """Measure what the ledger does not count, always on the first query, so that every run stores the same."""
        if one.hash in self._own:
            return
        inputs, own = self._first_query()
        options, flops = own_work(self.model, inputs, one.contender.strategy, self._runner.spec.layers)
        self._own[one.hash] = {**own, "strategy": float(flops)} if flops else own
        self._options[one.hash] = options

    def _first_query(self) -> tuple[Any, dict[str, float]]:
        """Decoder inputs of the first query, and the FLOPs of its mask head."""
        if self._measured is None:
            query = self.first.queries[0]
            encoded = self.model.encode_image(self.first.image)
            inputs = self.model.build_inputs(encoded, [query.text], is_sentence=[query.is_sentence])
            head = head_flops(self.model, encoded, query.text, query.is_sentence)
            self._measured = inputs, {"mask_head": float(head)} if head else {}
        return self._measured

    def _with_own(self, one: Configuration, record: Record) -> Record:
        flops = {**record.cost.flops, **self._own[one.hash]}
        return replace(record, cost=replace(record.cost, flops=flops))
