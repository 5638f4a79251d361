"""The base class of datasets that are read from a place of the user's: its path and options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenprune.datasets.base import Dataset
from tokenprune.errors import InputError, OptionError
from tokenprune.utils.files import expanded


class PathOptions(BaseModel):
    """Options of a dataset at a path; subclasses add fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PathDataset(Dataset):
    """A dataset at a path of the user's. `FileDataset` is one that lists its scenes before it reads them.

    Subclasses define `splits`, `kinds` and `scenes`, and may define a nested class `Options` of `PathOptions`.

    Args:
        path: of the dataset's folder, or its file.
        name: that it is registered as; by default that of the class.
        options: fields of `Options`.

    Raises:
        InputError: there is nothing at the path.
        OptionError: an unknown option, or a value that it cannot take.
    """

    class Options(PathOptions):
        """See `PathOptions`."""

    options: PathOptions
    layout: ClassVar[str] = ""
    """What is expected at the path, for messages: "refcoco/refs(unc).p, …"."""

    def __init__(self, path: str | Path, *, name: str | None = None, **options: Any) -> None:
        self.name = name or type(self).name  # type: ignore[misc]  # one class may have several names
        self.path = expanded(path)
        if not os.path.exists(self.path):
            raise InputError(f"dataset {self.name!r}: nothing is at {str(path)!r}; check the path{self._expected()}")
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            raise OptionError.from_validation(f"dataset {self.name!r}", error, self.Options.model_fields) from None

    @property
    def place(self) -> str:
        """Where it is read from and with which options, as `tokenprune.dataset` takes it."""
        given = self.options.model_dump(exclude_unset=True, mode="json")
        return ",".join((f"{self.name}:{self.path}", *(f"{key}={value}" for key, value in given.items())))

    def _expected(self) -> str:
        return f"; expected {self.layout}" if self.layout else ""
