"""The `VisionCapture` of segmentation models, based on the input that the model passes to its decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import Read
from tokenprune.engine import PromptMasks, VisionCapture
from tokenprune.errors import InputError
from tokenprune_adapters.segmentation.data import SegmenterInputs
from tokenprune_adapters.segmentation.many.joined import joined_value

if TYPE_CHECKING:
    from tokenprune_adapters.segmentation.decoder_runs import DecoderRuns

# Per thread: other threads may call the same decoder at the same time with other inputs.
_DECODED: ContextVar[tuple[DecoderRuns, SegmenterInputs] | None] = ContextVar("decoded", default=None)


@contextmanager
def decoding(model: DecoderRuns, inputs: SegmenterInputs) -> Iterator[None]:
    """Opened around calls of the model's decoder with these inputs, in this thread."""
    token = _DECODED.set((model, inputs))
    try:
        yield
    finally:
        _DECODED.reset(token)


class SegmenterCapture(VisionCapture):
    """Image tokens and reads of the prompts that a segmentation model is currently decoding."""

    def __init__(self, model: DecoderRuns) -> None:
        self._model = model

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """See `VisionCapture.prompt_masks`.

        Raises:
            InputError: the decoder was not called by the model's own methods.
        """
        masks = self._model.prompt_masks(self._inputs())
        return _WholePrompt(**{**vars(masks), "queries": {**masks.queries, **queries}})

    def provide(self, read: Read) -> Any:
        """See `VisionCapture.provide`."""
        values = [
            self._model.vision_source(part.encoded, len(part.prompts), part.texts).provide(read)
            for part in self._inputs().by_image
        ]
        return joined_value(read, values)

    def _inputs(self) -> SegmenterInputs:
        decoded = _DECODED.get()
        if decoded is None or decoded[0] is not self._model:
            raise InputError(
                f"{self._model.name}: its decoder was called directly, but only the model's own methods know the image "
                "tokens; call segment(image, query), or pass the decoder to tokenprune.prune(), with image_tokens="
            )
        return decoded[1]


class _WholePrompt(PromptMasks):
    """Masks of a prompt that must reach the decoder layers unchanged."""

    def layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        """See `PromptMasks.layout`. Raises InputError if the layers' input has another shape than the prompt."""
        if hidden.shape[:2] != self.image_tokens.shape:
            raise InputError(
                f"the decoder's layers received {list(hidden.shape[:2])} positions for a prompt of "
                f"{list(self.image_tokens.shape)}, so the image tokens may be elsewhere; remove the code that changes "
                "the decoder's input"
            )
        return super().layout(hidden, attention_mask)
