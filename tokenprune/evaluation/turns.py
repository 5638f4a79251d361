"""A segmentation model for whoever uses it beside other threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine.calls.turns import model_turn
from tokenprune.evaluation.protocol import SegmentationModel, SegmentationResult


class TurnTaking:
    """A segmentation model whose calls take turns with those of other threads, even if it does not see to that itself.

    Args:
        model: the model; see `SegmentationModel` for the methods.
    """

    def __init__(self, model: SegmentationModel) -> None:
        self._model = model
        self.name, self.decoder = model.name, model.decoder

    def encode_image(self, image: Any) -> Any:
        """See `SegmentationModel`."""
        with model_turn(self.decoder):
            return self._model.encode_image(image)

    def build_inputs(self, image: Any, queries: Sequence[str], *, is_sentence: Sequence[bool] | None = None) -> Any:
        """See `SegmentationModel`."""
        with model_turn(self.decoder):
            return self._model.build_inputs(image, queries, is_sentence=is_sentence)

    def run_decoder(self, inputs: Any, strategy: Strategy | None = None) -> tuple[Tensor, Trace | None]:
        """See `SegmentationModel`."""
        with model_turn(self.decoder):
            return self._model.run_decoder(inputs, strategy)

    def segment(
        self,
        image: Any,
        query: str | Sequence[str] | None = None,
        strategy: Strategy | None = None,
        *,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> SegmentationResult:
        """See `SegmentationModel`."""
        with model_turn(self.decoder):
            return self._model.segment(image, query, strategy=strategy, is_sentence=is_sentence)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """See `SegmentationModel`."""
        return self._model.grid_box(height, width)
