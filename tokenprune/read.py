"""The base of all that a stage may read; `tokenprune.reads` has the kinds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from tokenprune.errors import PluginError


@dataclass(frozen=True)
class Read:
    """One thing that a stage wants to see before it chooses.

    Attributes:
        field: names the attribute of `Tokens` that holds it.
        needs: what a model must have to offer it, for the message that refuses a model without it.
        axis: axis of the value that runs over the image tokens, None where none does.
        present: whether it tells of what an image token is now; else of the original token of that number.
        missing: what the value holds for tokens that a row does not have.

    Raises:
        PluginError: an attribute that is none of the values which its type, a `Literal`, names.
    """

    field: ClassVar[str]
    needs: ClassVar[str] = ""
    axis: ClassVar[int | None] = 1
    present: ClassVar[bool] = False
    missing: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for name, values in _literals(type(self)).items():  # type: ignore[arg-type] # mypy and hashes of classes
            if (found := getattr(self, name)) not in values:
                expected = " or ".join(map(repr, values))
                raise PluginError(f"{self}: {name}={found!r} is not known; expected {expected}")

    def __str__(self) -> str:
        return type(self).__name__

    @property
    def looks_back(self) -> bool:
        """Whether it is read out of the layer just before the stage, which a stage at layer 0 does not have."""
        return False


@cache
def _literals(kind: type[Read]) -> dict[str, tuple[Any, ...]]:
    """The attributes of a kind of read that can have few values, and these."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
