"""The configuration of a sweep: models × datasets × strategies × budgets × seeds, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenprune.datasets.base import Dataset
from tokenprune.errors import OptionError, TokenPruneError, UnknownNameError
from tokenprune.evaluation.contenders import Contender, budgets_of, contenders
from tokenprune.sweeps.entries import DatasetEntry, ModelEntry
from tokenprune.utils.arguments import listed, unicode_problem
from tokenprune.utils.yaml_file import read_mapping

ENGINES = ("local", "ray")
MAX_SEED = 2**32 - 1  # of numpy's and Optuna's generators; its multiples fit into the 63 bits of the store and of torch


class SweepConfig(BaseModel):
    """What a sweep runs.

    Attributes:
        models: sources, or entries with options.
        datasets: names, or entries with path, split, protocol and options.
        strategies: names with options, as in "csp:query=seg".
        budgets: shares of the image tokens.
        seeds: of datasets that draw at random and of strategies that do.
        limit: queries of each dataset; None = all of them.

    Examples:
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

    @field_validator("budgets", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        for item in listed(value):
            if percent := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", str(item).strip()):
                raise ValueError(f"write {float(percent[1]) / 100:g} for {percent[0]}")
        return value

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

    def check(self) -> dict[DatasetEntry, Dataset]:
        """Check everything that can be checked without loading a model; returns the datasets, which were made for it.

        Raises:
            OptionError: all problems at once: unknown names, options, splits and paths, budgets out of range, and
                entries that occur twice, or have the same name in the results.
        """
        made: dict[DatasetEntry, Dataset] = {}
        if problems := self.problems(made):
            raise OptionError(joined(problems))
        return made

    def problems(self, made: dict[DatasetEntry, Dataset]) -> list[str]:
        """What `check` refuses, each in one line; `made` is filled with the datasets."""
        found: list[str] = []

        def make(entry: DatasetEntry) -> None:
            made[entry] = entry.make()

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
            attempt("datasets", partial(make, entry))
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
    """A configuration from a YAML or JSON file, or from a mapping; checked, see `read_checked`."""
    return read_checked(source)[0]


def read_checked(
    source: SweepConfig | Mapping[str, Any] | str | Path,
) -> tuple[SweepConfig, dict[DatasetEntry, Dataset]]:
    """A configuration from a YAML or JSON file, or from a mapping; checked, with its datasets.

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
    return found, found.check()


def _problems_of(given: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What is wrong with the values, and what is wrong with the rest of them."""
    every = error.errors()
    inside = {
        item["loc"][0] for item in every if len(item["loc"]) > 1
    }  # keys with a bad element, which pydantic counts
    told = [item for item in every if item["type"] != "too_short" or item["loc"][0] not in inside]
    found = [_told(item) for item in told]
    parts: dict[str, tuple[Any, ...]] = {}
    for name, default in (("models", ()), ("datasets", ()), ("strategies", ()), ("budgets", (0.35,)), ("seeds", (0,))):
        value = given.get(name, default)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        parts[name] = tuple(one for item in items for one in _valid(name, item))
    rest = SweepConfig.model_construct(**parts, limit=None)  # type: ignore[arg-type]
    return [*found, *rest.problems({})]


def _told(item: Mapping[str, Any]) -> str:
    """One of pydantic's findings; unknown keys with those that exist beside them."""
    known = ModelEntry.model_fields if item["loc"][0] == "models" else SweepConfig.model_fields
    return str(OptionError.from_validation("", _Errors([item]), known)).removeprefix(": ")


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
