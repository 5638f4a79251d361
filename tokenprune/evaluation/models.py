"""The models that an evaluation runs: which attributes and methods they need, and how their calls take turns.

Adapters return such objects; there is no base class to inherit from.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.engine.interface.turns import model_turn
from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown

MODEL_PARTS = ("name", "decoder", "encode_image", "build_inputs", "run_decoder", "segment", "grid_box")


class SegmentationResult(Protocol):
    """What `segment` returns; with forced answers mask i belongs to query i.

    Where queries share batch rows of the trace, as turns of one conversation do, `row_index` (a list of ints) holds
    the row of each mask; without it mask i is from row i.
    """

    @property
    def masks(self) -> Tensor:
        """bool [queries, H, W]."""

    @property
    def trace(self) -> Trace | None:
        """Of the prefill; None without a strategy."""


@runtime_checkable
class SegmentationModel(Protocol):
    """A model that computes masks from an image and queries, in steps that comparisons of strategies share.

    Attributes:
        name: for reports.
        decoder: the transformers decoder that strategies prune; its `config` and parameters are read.
    """

    name: str
    decoder: Any

    def encode_image(self, image: Any) -> Any:
        """Everything that depends only on the image: vision tower, projector, the mask head's image encoder.

        Raises InputError if it is not an image.
        """

    def build_inputs(self, image: Any, queries: Sequence[str], *, is_sentence: Sequence[bool] | None = None) -> Any:
        """The decoder's teacher-forced input for queries about an encoded image. Raises InputError for an empty one."""

    def run_decoder(self, inputs: Any, strategy: Strategy | None = None) -> tuple[Tensor, Trace | None]:
        """One prefill, including the strategy's work: states [queries, sequence, width]; with a strategy, a trace."""

    def segment(
        self,
        image: Any,
        query: str | Sequence[str] | None = None,
        strategy: Strategy | None = None,
        *,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> SegmentationResult:
        """Masks of one or several queries about an image, or about what `encode_image` returned."""

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens' grid divides: (top, left, bottom, right) in its own pixels."""


def check_model(model: object) -> SegmentationModel:
    """The model, if it is a `SegmentationModel`.

    Raises:
        InputError: it lacks an attribute or method of `SegmentationModel`.
    """
    if isinstance(model, SegmentationModel):
        return model
    lacking = [name for name in MODEL_PARTS if not hasattr(model, name)]
    raise InputError(
        f"model={shown(model)} found, expected a segmentation model, as tokenprune.load('lisa-tiny') gives, or its "
        f"name; it has no {', no '.join(lacking)}"
    )


class AnswerResult(Protocol):
    """What `answer` returns; `row` is the answer's batch row in the trace."""

    @property
    def text(self) -> str:
        """The words."""

    @property
    def trace(self) -> Trace | None:
        """Of the prefill; None without a strategy."""

    @property
    def row(self) -> int:
        """0 for a single prompt."""


@runtime_checkable
class AnsweringModel(Protocol):
    """A model that answers in words about an image, for `tokenprune answer`; it does not make masks."""

    def answer(
        self, image: Any, prompt: str, strategy: Strategy | None = None, max_new_tokens: int = 64
    ) -> AnswerResult:
        """The answer to a prompt about an image. Raises InputError if it is not an image, or the prompt is empty."""


class TurnTaking:
    """A segmentation model whose calls take turns with those of other threads, even if the model itself does not.

    Args:
        model: the model; see `SegmentationModel` for the methods. Its attribute `one_conversation`, if it has one, says
            whether several forced queries are turns of one conversation.
    """

    def __init__(self, model: SegmentationModel) -> None:
        self._model = model
        self.name, self.decoder = model.name, model.decoder
        self.one_conversation = bool(getattr(model, "one_conversation", False))

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
        **options: Any,
    ) -> SegmentationResult:
        """See `SegmentationModel`; further options are the model's own."""
        with model_turn(self.decoder):
            return self._model.segment(image, query, strategy=strategy, is_sentence=is_sentence, **options)

    def takes(self, option: str) -> bool:
        """Whether the model's `segment` has this option."""
        return option in inspect.signature(self._model.segment).parameters

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """See `SegmentationModel`."""
        return self._model.grid_box(height, width)
