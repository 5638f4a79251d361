"""The protocol of datasets for reasoning segmentation: scenes, and queries about them with target masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Query:
    """One referring expression and the region it refers to.

    `text` is a phrase (it fits "What is {} in this image?") or, with `is_sentence`, a sentence of its own. `kind` is
    one of the dataset's kinds. `mask` is [H, W] at the size of the scene's image: bool, or numbers where 0 is
    background, 1 is foreground and 255, together with 1, is ignored (`tokenprune.utils.masks`). Plain arrays of only 0
    and 255 are refused: use `mask == 255` if 255 is the foreground, `with_ignored(target, ignored)` if it is ignored.

    `id` names the query in its dataset, where it has a name (REFER's `sent_id`, ReasonSeg's file stem). `targets` are
    the masks of the single objects, bool [H, W] each, where a query asks for several; `mask` is then their union.
    """

    text: str
    kind: str
    mask: NDArray[np.bool_]
    is_sentence: bool = False
    id: str = ""
    targets: tuple[NDArray[np.bool_], ...] = ()


@dataclass(frozen=True, eq=False)
class Scene:
    """One image, uint8 RGB [H, W, 3] (as from `tokenprune.utils.images.to_rgb`), and the queries about it."""

    id: str
    image: NDArray[np.uint8]
    queries: list[Query]

    def only(self, queries: Sequence[int]) -> Scene:
        """The scene with some of its queries, by their numbers."""
        return replace(self, queries=[self.queries[number] for number in queries])


class Dataset(ABC):
    """A named collection of scenes in splits."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]

    @abstractmethod
    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """Yield scenes of `split`; `limit` counts queries, and the last scene is cut to meet it.

        Raises a `TokenPruneError` if the split is unknown.
        """
