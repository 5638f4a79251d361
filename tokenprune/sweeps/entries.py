"""Models and datasets of a sweep, as its configuration names them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokenprune.core.by_name import parse_options
from tokenprune.datasets.base import Dataset
from tokenprune.datasets.by_name import dataset, split_path
from tokenprune.errors import OptionError, UnknownNameError, nearest
from tokenprune.evaluation.protocols import ProtocolName
from tokenprune.loading.checkpoints import find_checkpoint
from tokenprune.loading.device_names import check_device, check_dtype
from tokenprune.plugins import registry


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
        try:
            made = dataset(self.text, **(self.model_extra or {}))
        except OptionError as error:
            raise OptionError(f"{error}{self._meant()}") from error
        if self.split not in made.splits:
            raise UnknownNameError.among(f"split of dataset {made.name!r}", self.split, made.splits)
        return made

    def _meant(self) -> str:
        """A hint where a key is no option of the dataset, and looks like one of an entry."""
        kind = registry.datasets()[self._head].load() if self._head is not None else None
        options = getattr(getattr(kind, "Options", None), "model_fields", {})
        keys = DatasetEntry.model_fields
        unknown = [name for name in self.model_extra or {} if name not in options]
        near = {name: found[0] for name in unknown if (found := nearest(name, [*keys, *options])) and found[0] in keys}
        return "".join(f" (did you mean {meant!r} by {name!r}?)" for name, meant in near.items())
