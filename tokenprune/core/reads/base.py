"""What every read is.

Examples:
    >>> import tokenprune as tp
    >>> isinstance(tp.HiddenStates(), tp.Read), tp.HiddenStates().field
    (True, 'hidden')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.utils.arguments import check_literals


@dataclass(frozen=True)
class Read:
    """One input of a stage's choice.

    Attributes:
        field: the attribute of `Tokens` that holds the value.
        needs: what a model must have to provide it, for the error message.
        axis: the axis of the value that indexes image tokens; None if there is none.
        present: whether the value describes the token as it is now; else the original token of that number.
        missing: the value at tokens that a row does not have.
        infinite: whether infinity has a meaning in the value. It is refused otherwise, as NaN always is.

    Raises:
        PluginError: an attribute annotated as a `Literal` has a value that is not listed there.
    """

    field: ClassVar[str]
    needs: ClassVar[str] = ""
    axis: ClassVar[int | None] = 1
    present: ClassVar[bool] = False
    missing: ClassVar[float] = 0.0
    infinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_literals(self)

    def __str__(self) -> str:
        return type(self).__name__

    @property
    def looks_back(self) -> bool:
        """Whether the layer just before the stage is read, which a stage at layer 0 does not have."""
        return False


def kinds_of_reads() -> list[type[Read]]:
    """All kinds of reads, those of plugins too."""
    known, found = [Read], []
    while known:
        kind = known.pop(0)
        known += kind.__subclasses__()
        if isinstance(kind.__dict__.get("field"), str):  # one that is refused later may have anything
            found.append(kind)
    return found
