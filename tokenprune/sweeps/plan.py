"""What a sweep runs: groups that share a model and a dataset, and the configurations of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenprune.evaluation.contenders import Contender
from tokenprune.evaluation.protocols import Protocol, protocol_of
from tokenprune.sweeps.config import SweepConfig
from tokenprune.sweeps.entries import DatasetEntry, ModelEntry

SEED_STEP = 1_000_003  # between the draws of two seeds lie those of more scenes than any dataset has


@dataclass(frozen=True)
class Configuration:
    """One row of the results: a contender on a dataset with a model and a seed.

    Attributes:
        hash: of everything below, but for the limit on queries.
        model, dataset, split, protocol: as in the results.
        contender: the strategy at a budget.
        seed: of the dataset and of the strategy.
    """

    hash: str
    model: str
    dataset: str
    split: str
    protocol: str
    contender: Contender
    seed: int


@dataclass(frozen=True)
class Group:
    """Configurations that run side by side: on the same scenes, each encoded once by the same model."""

    model: ModelEntry
    dataset: DatasetEntry
    seed: int
    configurations: tuple[Configuration, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """For progress bars."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model.label} on {self.dataset.label} ({self.dataset.split}{seed})"

    def asked(self, number: int, queries: int) -> list[int]:
        """Which of the queries of a scene the protocol asks."""
        return protocol_of(self.dataset.protocol).asked(queries, number, self.seed * SEED_STEP)

    @property
    def draws(self) -> bool:
        """Whether the protocol asks other queries of a scene that has more of them."""
        protocol = protocol_of(self.dataset.protocol)
        return type(protocol).asked is not Protocol.asked

    @property
    def source(self) -> str:
        """A digest of model, dataset and seed: two groups of the same source see the same scenes."""
        return digest({"model": _of_model(self.model), "dataset": _of_dataset(self.dataset), "seed": self.seed})

    @property
    def data(self) -> str:
        """A digest of the dataset alone."""
        return digest(_of_dataset(self.dataset))


def groups_of(config: SweepConfig) -> list[Group]:
    """The groups of a sweep, in the order of its models, datasets and seeds."""
    field_of = config.contenders()
    return [
        Group(model, entry, seed, tuple(configuration_of(model, entry, contender, seed) for contender in field_of))
        for model in config.models
        for entry in config.datasets
        for seed in config.seeds
    ]


def digest(value: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def configuration_of(model: ModelEntry, entry: DatasetEntry, contender: Contender, seed: int) -> Configuration:
    """A contender on a dataset with a model and a seed."""
    strategy = contender.strategy
    what = {
        "model": _of_model(model),
        "dataset": _of_dataset(entry),
        "strategy": strategy.name,
        "options": strategy.options.model_dump(mode="json", fallback=repr),
        "given": contender.given,  # a budget moves what is not given
        "budget": strategy.budget,
        "seed": seed,
    }
    return Configuration(digest(what), model.label, entry.label, entry.split, entry.protocol, contender, seed)


def _of_model(model: ModelEntry) -> Mapping[str, Any]:
    """What decides about results, not where weights or computations lie."""
    return {"name": model.label, "dtype": model.dtype}


def _of_dataset(entry: DatasetEntry) -> Mapping[str, Any]:
    return {"name": entry.label, "split": entry.split, "protocol": entry.protocol, "options": entry.options}
