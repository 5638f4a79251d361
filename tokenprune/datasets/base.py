"""What a dataset for reasoning segmentation offers: scenes, and queries about them with their target masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Query:
    """One referring expression and the region it means.

    `text` is a phrase (it fits "What is {} in this image?") or, with `is_sentence`, a sentence of its own. `kind` is
    one of the dataset's kinds. `mask` is [H, W] at the size of the scene's image: bool, or numbers where 0 is
    background, 1 is foreground and 255, beside a 1, does not count (`tokenprune.utils.masks`). Masks of 0 and 255
    alone are refused: give `mask == 255` where 255 is the foreground.
    """

    text: str
    kind: str
    mask: NDArray[np.bool_]
    is_sentence: bool = False


@dataclass(frozen=True, eq=False)
class Scene:
    """One image, uint8 RGB [H, W, 3] (`tokenprune.utils.images.to_rgb` reads any file so), and the queries about it."""

    id: str
    image: NDArray[np.uint8]
    queries: list[Query]


class Dataset(ABC):
    """A named collection of scenes in splits."""

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]

    @abstractmethod
    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """Yield scenes of `split`; `limit` counts queries, and the last scene is cut to meet it.

        Raises a `TokenPruneError` where the split is unknown.
        """
