"""What GLaMM gives back: masks, and the phrases that they ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenprune_adapters.segmentation.data import Segmentation, short


@dataclass(frozen=True, repr=False)
class GroundedSegmentation(Segmentation):
    """A segmentation whose masks may belong to phrases of the answer.

    Args:
        phrases: for each mask the words between <p> and </p> before its [SEG]; "" where there are none.
    """

    phrases: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """See `Segmentation.lines`."""
        return [*super().lines(), f".phrases: {short(self.phrases)}"]


def phrase_span(ids: Sequence[int], place: int, seg: int, start: int, end: int) -> tuple[int, int]:
    """Where the phrase of a [SEG] stands: the last complete `<p> … </p>` since the [SEG] before it.

    Args:
        ids: of an answer.
        place: of the [SEG] in `ids`.
        seg, start, end: ids of [SEG], <p> and </p>.

    Returns:
        Begin and end of the words in `ids`, without the marks; an empty span where there is no phrase.
    """
    since = max((i + 1 for i in range(place) if ids[i] == seg), default=0)
    closes = [i for i in range(since, place) if ids[i] == end]
    opens = [i for i in range(since, closes[-1]) if ids[i] == start] if closes else []
    return (opens[-1] + 1, closes[-1]) if opens else (place, place)
