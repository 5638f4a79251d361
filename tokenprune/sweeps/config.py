"""The configuration of a sweep: models × datasets × strategies × budgets × seeds, checked as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenprune.core.by_name import parse_options
from tokenprune.datasets.base import Dataset
from tokenprune.datasets.by_name import dataset, split_path
from tokenprune.errors import OptionError, TokenPruneError, UnknownNameError
from tokenprune.evaluation.contenders import Contender, budgets_of, contenders
from tokenprune.evaluation.protocols import ProtocolName
from tokenprune.loading.checkpoints import find_checkpoint
from tokenprune.loading.device_names import check_device, check_dtype
from tokenprune.plugins import registry
from tokenprune.utils.arguments import unicode_problem
from tokenprune.utils.yaml_file import read_mapping

ENGINES = ("local", "ray")
MAX_SEED = 2**32 - 1  # of numpy's and Optuna's generators; its multiples fit into the 63 bits of the store and of torch


class ModelEntry(BaseModel):
    """A model of a sweep.

    Attributes:
        source: an argument of `tokenprune.load`: a name, a folder or a hub id.
        name: in the results; by default the source.
        vision_tower, dtype, device: as for `tokenprune.load`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    name: str = ""
    vision_tower: str | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def label(self) -> str:
        """In the results."""
        return self.name or self.source

    def check(self) -> None:
        """Raises a TokenPruneError if there is no such model, device or number format."""
        if self.device is not None:
            check_device(self.device)
        if self.dtype is not None:
            check_dtype(self.dtype)
        find_checkpoint(self.source)

    @property
    def options(self) -> dict[str, str]:
        """Options of `tokenprune.load`."""
        found = {"vision_tower": self.vision_tower, "dtype": self.dtype, "device": self.device}
        return {name: value for name, value in found.items() if value is not None}


class DatasetEntry(BaseModel):
    """A dataset of a sweep; further keys are options of the dataset, such as `splitby`.

    Attributes:
        name: of the dataset, with or without its path ("reasonseg", "reasonseg:/data/ReasonSeg", "my_data:MyData").
        path: where it is read from.
        title: in the results; by default the name without its path.
        split: of the dataset.
        protocol: how a query is asked and its mask found; see `evaluation.protocols`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    path: str | None = None
    title: str = ""
    split: str = "val"
    protocol: ProtocolName = "forced"

    @property
    def text(self) -> str:
        """The name with its path and the options behind it, as `tokenprune.dataset` takes it."""
        return self.name if self.path is None else f"{self.name}:{self.path}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the dataset, also those written behind its path."""
        written: dict[str, Any] = {}
        if self._head is not None:
            with suppress(OptionError):  # which `make` raises
                written = parse_options(split_path(self.text.partition(":")[2])[1])
        return {**written, **(self.model_extra or {})}

    @property
    def label(self) -> str:
        """In the results: its title, or its name without the path."""
        return self.title or self._head or self.name

    @property
    def _head(self) -> str | None:
        """The registered name before a path; None of "module:Class"."""
        head = self.text.partition(":")[0]
        return head if head in registry.datasets() else None

    def make(self) -> Dataset:
        """The dataset. Raises a TokenPruneError if there is none, or if it has no such split."""
        made = dataset(self.text, **(self.model_extra or {}))
        if self.split not in made.splits:
            raise UnknownNameError.among(f"split of dataset {made.name!r}", self.split, made.splits)
        return made


class SweepConfig(BaseModel):
    """What a sweep runs.

    Attributes:
        models: sources, or entries with options.
        datasets: names, or entries with path, split, protocol and options.
        strategies: names with options, as in "csp:query=seg".
        budgets: shares of the image tokens.
        seeds: of datasets that draw at random and of strategies that do.
        limit: queries of each dataset; None = all of them.

    Example:
        >>> from tokenprune.sweeps.config import SweepConfig
        >>> config = SweepConfig(models=["lisa-tiny"], datasets=["shapes"], strategies=["none", "fastv"], limit=8)
        >>> [contender.label for contender in config.contenders()]
        ['none', 'fastv at 0.35']
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    datasets: tuple[DatasetEntry, ...] = Field(min_length=1)
    strategies: tuple[str, ...] = Field(min_length=1)
    budgets: tuple[float, ...] = Field((0.35,), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    limit: int | None = Field(None, ge=1)

    @field_validator("models", "datasets", mode="before")
    @classmethod
    def _entries(cls, value: Any, info: Any) -> Any:
        key = "source" if info.field_name == "models" else "name"
        items = [value] if isinstance(value, (str, Mapping)) else value
        if not isinstance(items, (list, tuple)):
            return items  # which pydantic refuses
        return [{key: item} if isinstance(item, str) else item for item in items]

    @field_validator("strategies", "budgets", "seeds", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int, float)) else value

    @field_validator("budgets", "seeds", "limit", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if any(isinstance(item, bool) for item in (value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError("input should be a number, not true or false")
        return value

    @field_validator("seeds")
    @classmethod
    def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value, default=0) < 0:
            raise ValueError(f"a seed must be 0 or more, got {min(value)}")
        if max(value, default=0) > MAX_SEED:
            raise ValueError(f"a seed must be at most {MAX_SEED}, got {max(value)}")
        return value

    def contenders(self) -> list[Contender]:
        """Strategies at budgets; errors as in `evaluation.contenders.contenders`."""
        return contenders(self.strategies, self.budgets)

    def check(self) -> None:
        """Check everything that can be checked without loading a model.

        Raises:
            OptionError: all problems at once: unknown names, options, splits and paths, budgets out of range, and
                entries that occur twice, or have the same name in the results.
        """
        if problems := self.problems():
            raise OptionError(joined(problems))

    def problems(self) -> list[str]:
        """What `check` refuses, each in one line."""
        found: list[str] = []

        def attempt(where: str, run: Callable[[], object]) -> None:
            try:
                run()
            except TokenPruneError as error:
                found.append(f"{where}: {error}")

        texts = texts_of(self.model_dump())
        if damaged := [f"{text[:60]!a} {problem}" for text in texts if (problem := unicode_problem(text))]:
            return damaged  # which no message could print
        for model in self.models:
            attempt("models", model.check)
        for entry in self.datasets:
            attempt("datasets", entry.make)
        before = len(found)
        for budget in dict.fromkeys(self.budgets):
            attempt("budgets", lambda budget=budget: budgets_of(budget))  # type: ignore[misc]
        possible = self.budgets if len(found) == before and self.budgets else (1.0,)
        for text in self.strategies:
            attempt("strategies", lambda text=text: contenders([text], possible))  # type: ignore[misc]
        if not found and self.strategies and self.budgets:
            attempt("strategies", self.contenders)
        for name in ("models", "datasets", "budgets", "seeds"):
            twice = repeated(getattr(self, name))
            found.extend(f"{name}: {getattr(item, 'label', item)} occurs twice; leave one out" for item in twice)
        if repeated([model.label for model in self.models]) and not repeated(self.models):
            found.append("models: two have the same name in the results; give each a name of its own")
        shown = [(entry.label, entry.split, entry.protocol) for entry in self.datasets]
        if repeated(shown) and not repeated(self.datasets):
            found.append("datasets: two have the same name and split in the results; give each a title of its own")
        if not found and self.strategies and self.budgets:
            for label in repeated([contender.label for contender in self.contenders()]):
                found.append(
                    f"strategies: two are {label!r} in the results; leave one out, or take budgets farther apart"
                )
        return found


def texts_of(value: Any) -> list[str]:
    """All texts in plain data, keys included."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in texts_of(part)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in texts_of(part)]
    return [value] if isinstance(value, str) else []


def repeated(items: Sequence[Any]) -> list[Any]:
    """The items that are equal to an earlier one."""
    return [item for number, item in enumerate(items) if item in items[:number]]


def check_engine(name: str) -> None:
    """Raises UnknownNameError unless it is the name of an engine."""
    if name not in ENGINES:
        raise UnknownNameError.among("engine", name, ENGINES)


def joined(problems: list[str]) -> str:
    """All problems of a configuration in one line."""
    count = f"{len(problems)} problems in the configuration: " if len(problems) > 1 else "configuration: "
    return count + "; ".join(problems)


def read_config(source: SweepConfig | Mapping[str, Any] | str | Path) -> SweepConfig:
    """A configuration from a YAML or JSON file, or from a mapping; checked.

    Raises:
        InputError: the file cannot be read, or is not YAML.
        OptionError: unknown keys, or values that are impossible; all problems at once.
    """
    if isinstance(source, SweepConfig):
        found = source
    else:
        given = source if isinstance(source, Mapping) else read_mapping(source, SweepConfig.model_fields)
        try:
            found = SweepConfig.model_validate(dict(given))
        except ValidationError as error:
            raise OptionError(joined(_problems_of(given, error))) from None
    found.check()
    return found


def _problems_of(given: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What is wrong with the values, and what is wrong with the rest of them."""
    every = error.errors()
    inside = {
        item["loc"][0] for item in every if len(item["loc"]) > 1
    }  # keys with a bad element, which pydantic counts
    told = [item for item in every if item["type"] != "too_short" or item["loc"][0] not in inside]
    known = SweepConfig.model_fields
    found = [str(OptionError.from_validation("", _Errors([item]), known)).removeprefix(": ") for item in told]
    parts: dict[str, tuple[Any, ...]] = {}
    for name, default in (("models", ()), ("datasets", ()), ("strategies", ()), ("budgets", (0.35,)), ("seeds", (0,))):
        value = given.get(name, default)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        parts[name] = tuple(one for item in items for one in _valid(name, item))
    rest = SweepConfig.model_construct(**parts, limit=None)  # type: ignore[arg-type]
    return [*found, *rest.problems()]


def _valid(name: str, item: Any) -> tuple[Any, ...]:
    """An item of one of the lists, as it is read; empty if it is impossible."""
    least = {"models": "lisa-tiny", "datasets": "shapes", "strategies": "none"}
    try:
        found: tuple[Any, ...] = getattr(SweepConfig.model_validate({**least, name: [item]}), name)
    except ValidationError:
        return ()
    return found


class _Errors(Exception):
    """Some of the errors of a ValidationError."""

    def __init__(self, found: list[Any]) -> None:
        self._found = found

    def errors(self) -> list[Any]:
        """As of a ValidationError."""
        return self._found
