"""The configuration of a sweep: models × datasets × strategies × budgets × seeds, checked as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenprune.datasets.base import Dataset
from tokenprune.datasets.by_name import dataset, split_path
from tokenprune.errors import InputError, OptionError, TokenPruneError, UnknownNameError
from tokenprune.evaluation.contenders import Contender, contenders
from tokenprune.evaluation.protocols import ProtocolName
from tokenprune.loading.checkpoints import find_checkpoint
from tokenprune.loading.device_names import check_device, check_dtype
from tokenprune.utils.files import absent, path_given, reason

ENGINES = ("local", "ray")


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
    def options(self) -> dict[str, Any]:
        """Options of the dataset."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """In the results: its title, or its name without the path."""
        if self.title:
            return self.title
        head, colon, rest = self.name.partition(":")
        return head if colon and ("/" in rest or "." in split_path(rest)[0]) else self.name

    def make(self) -> Dataset:
        """The dataset. Raises a TokenPruneError if there is none, or if it has no such split."""
        made = dataset(self.name if self.path is None else f"{self.name}:{self.path}", **self.options)
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

    @field_validator("seeds")
    @classmethod
    def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 0:
            raise ValueError(f"a seed must be 0 or more, got {min(value)}")
        return value

    def contenders(self) -> list[Contender]:
        """Strategies at budgets; errors as in `evaluation.contenders.contenders`."""
        return contenders(self.strategies, self.budgets)

    def check(self) -> None:
        """Check everything that can be checked without loading a model.

        Raises:
            OptionError: all problems at once: unknown names, options, splits and paths, budgets out of range, and
                entries that occur twice.
        """
        problems: list[str] = []

        def attempt(where: str, run: Callable[[], object]) -> None:
            try:
                run()
            except TokenPruneError as error:
                problems.append(f"{where}: {error}")

        for model in self.models:
            attempt("models", model.check)
        for entry in self.datasets:
            attempt("datasets", entry.make)
        for text in self.strategies:
            attempt("strategies", lambda text=text: contenders([text], self.budgets))  # type: ignore[misc]
        if not problems:
            attempt("strategies", self.contenders)
        for name in ("models", "datasets", "budgets", "seeds"):
            twice = repeated(getattr(self, name))
            problems.extend(f"{name}: {getattr(item, 'label', item)} occurs twice; leave one out" for item in twice)
        if repeated([model.label for model in self.models]) and not repeated(self.models):
            problems.append("models: two have the same name in the results; give each a name of its own")
        shown = [(entry.label, entry.split, entry.protocol, entry.options) for entry in self.datasets]
        if repeated(shown) and not repeated(self.datasets):
            problems.append("datasets: two have the same name and split in the results; give each a title of its own")
        if problems:
            raise OptionError(joined(problems))


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
        given = source if isinstance(source, Mapping) else _read_file(source)
        try:
            found = SweepConfig.model_validate(dict(given))
        except ValidationError as error:
            raise OptionError.from_validation("sweep configuration", error, SweepConfig.model_fields) from None
    found.check()
    return found


def _read_file(path: str | Path) -> Mapping[str, Any]:
    import yaml

    name = f"configuration {str(path)!r}"
    try:
        given = yaml.safe_load(path_given("config", path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"configuration {absent(path)}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({reason(error)}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not YAML ({' '.join(str(error).split())[:160]}); correct it") from None
    if not isinstance(given, Mapping):
        keys = ", ".join(SweepConfig.model_fields)
        raise InputError(f"{name} holds {type(given).__name__}, expected keys and values: {keys}")
    return given
