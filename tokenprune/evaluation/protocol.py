"""What an evaluation needs of a segmentation model. Adapters return such objects; nothing has to be inherited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tokenprune.base import Strategy
from tokenprune.trace import Trace


class SegmentationResult(Protocol):
    """What `segment` returns; with forced answers mask i belongs to query i."""

    @property
    def masks(self) -> Tensor:
        """bool [queries, H, W]."""

    @property
    def trace(self) -> Trace | None:
        """Of the prefill; None where no strategy ran."""


@runtime_checkable
class SegmentationModel(Protocol):
    """A model that turns an image and queries into masks, in steps that strategies can share.

    Attributes:
        name: how reports call it.
        decoder: the transformers decoder that strategies prune; its `config` and parameters are read.
    """

    name: str
    decoder: Any

    def prepare_image(self, image: Any) -> Any:
        """The image as the towers want it. Raises InputError for what is no image."""

    def encode_image(self, prepared: Any) -> Any:
        """Everything that depends on the image alone: vision tower, projector, the mask head's image encoder."""

    def prompts(self, query: Sequence[str], *, is_sentence: Sequence[bool] | None = None) -> list[str]:
        """The whole prompts, forced answers included. Raises InputError for an empty query."""

    def build_inputs(self, prompts: Sequence[str], encoded: Any) -> Any:
        """The decoder's input for prompts about one image."""

    def pruned(self, strategy: Strategy | None, inputs: Any, encoded: Any) -> AbstractContextManager[Any]:
        """The context in which the decoder runs under a strategy; gives the run (`run.trace`), or None without one."""

    def final_states(self, inputs: Any) -> Tensor:
        """One prefill: [prompts, sequence, width]."""

    def segment(
        self,
        image: Any,
        query: str | Sequence[str] | None = None,
        strategy: Strategy | None = None,
        *,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> SegmentationResult:
        """Masks of one or several queries about an image, or about what `encode_image` returned."""


def grid_box(model: SegmentationModel, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of an image that the image tokens' grid divides: (top, left, bottom, right) in pixels of the original.

    A model whose tower sees a crop says so with a method `grid_box(height, width)`; else it is the whole image.
    """
    own = getattr(model, "grid_box", None)
    if own is None:
        return 0.0, 0.0, float(height), float(width)
    top, left, bottom, right = own(height, width)
    return float(top), float(left), float(bottom), float(right)


def prefill(model: SegmentationModel, inputs: Any, encoded: Any, strategy: Strategy | None = None) -> Trace | None:
    """Run the decoder once, the strategy's own work included; the trace where a strategy ran."""
    with model.pruned(strategy, inputs, encoded) as run:
        model.final_states(inputs)
    return None if run is None else run.trace
