"""A model whose image tokens the caller marks, and a check that each prefill is of the marked prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import Read
from tokenprune.engine.calls.call_stack import EarlierCalls
from tokenprune.engine.calls.generate import generation
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import InputError


class _ThreadState(threading.local):
    """The current call of one thread.

    Attributes:
        inside: whether the model's forward is running.
        mask: its attention mask.
        embeds: its embeddings, if it was called without ids.
        prompt: fingerprint of the latest prompt outside `generate`, see `_PromptMarks`.
    """

    inside = False
    mask: Tensor | None = None
    embeds: Any = None
    prompt: Tensor | None = None


class MarkedModel(BoundModel, VisionCapture):
    """A model whose image tokens the caller marks."""

    def __init__(
        self,
        model: nn.Module,
        image_tokens: Tensor,
        grid: Tensor | None = None,
        image_number: Tensor | None = None,
        vision: VisionSource | None = None,
    ) -> None:
        self.name, self.decoder = type(model).__name__, model
        self._marks = _PromptMarks(image_tokens, grid=grid, image_number=image_number)
        self._now = _ThreadState()
        self._before = EarlierCalls(model, "forward")
        self._vision = vision or VisionSource()
        self.tower_layers = self._vision.layers

    def offers(self) -> frozenset[type[Read]]:
        """The reads that the caller's source provides."""
        return frozenset(self._vision.answers)

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """Observe the model's attention mask, which its decoder may receive in another form."""
        with shadowed(self.decoder, "forward", self._forward):
            self._before.record()
            yield self

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now, inputs = self._now, arguments(self.decoder, args, kwargs)
        now.inside, now.mask = True, padding_mask(inputs)
        now.embeds = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else None
        try:
            return original(*args, **kwargs)
        finally:  # the decoder may be called directly next
            now.inside, now.mask, now.embeds = False, None, None

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """The caller's masks.

        Raises:
            InputError: embeddings with more positions than the masks, which may be anywhere. Additional ids are
                accepted as tokens generated without a cache.
        """
        embeds, marked = self._now.embeds, self._marks.image_tokens
        if isinstance(embeds, Tensor) and isinstance(marked, Tensor) and embeds.shape[1] > marked.shape[-1]:
            raise InputError(
                f"image_tokens: the mask covers {marked.shape[-1]} positions, but inputs_embeds has {embeds.shape[1]}, "
                "and the others may precede the prompt (as virtual tokens of PEFT's prompt tuning do); pass a mask "
                "over the whole input"
            )
        call = generation(self.decoder)
        return replace(
            self._marks,
            queries=queries,
            attention_mask=self._now.mask,
            seen=self._now if call is None else call,
            others=call is not None and call.begun,
        )

    def missed(self) -> bool:
        """See `VisionCapture`."""
        return not self._now.inside and self._before.in_progress()

    def padding(self) -> Tensor | None:
        """See `VisionCapture`."""
        return self._now.mask

    def provide(self, read: Read) -> Any:
        """The answer of the caller's source."""
        return self._vision.provide(read)


@dataclass(frozen=True)
class _PromptMarks(PromptMasks):
    """Masks of one prompt, which may be followed by generated tokens.

    The prompt is recognised by a fingerprint of its text: the sum of each embedding's bits outside image tokens.

    Attributes:
        seen: the object whose attribute `prompt` stores the fingerprint of the latest prompt, int64 [batch, prompt].
        others: whether other prompts are expected, such as the second stream of `generate`; they count as text only.
    """

    seen: Any = None
    others: bool = False

    def layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        """See `PromptMasks.layout`.

        Raises:
            InputError: masks that do not match the input, or another prompt.
        """
        image, (batch, length) = self.image_tokens, hidden.shape[:2]  # of any type: the caller's
        if not isinstance(image, Tensor) or image.dim() != 2 or not len(image) or batch % len(image):
            return super().layout(hidden, attention_mask)  # raises the error
        rows, own = image.shape
        masks, (attention_mask, numbers) = self.on_host(attention_mask, _numbers(hidden[:, :own]))
        marked = masks.image_tokens.bool().repeat_interleave(batch // rows, 0)
        # only text: image features are recomputed in each call and need not be bit-identical
        fingerprint = numbers.masked_fill(marked[:, : numbers.shape[1]], 0)
        same = self.seen.prompt is not None and torch.equal(fingerprint, self.seen.prompt)
        if self.others and not same:
            text = torch.zeros(batch, length, dtype=torch.bool)
            return PromptMasks(text, attention_mask=masks.attention_mask).layout(hidden, attention_mask)
        if length != own and not same:
            raise InputError(
                f"image_tokens: the mask of shape {[rows, own]} does not match a forward of {[batch, length]}, which "
                "is neither its prompt nor that prompt followed by generated tokens; masks cover the expanded prompt: "
                "open another context with a mask for this prompt (all False if it contains only text)"
            )
        groups = fingerprint.reshape(rows, batch // rows, -1)
        if rows > 1 and not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise InputError(
                f"image_tokens: the mask has {rows} rows for a batch of {batch}, which does not consist of {rows} "
                "prompts, each repeated; pass a mask with one row for each row of the batch"
            )
        self.seen.prompt = fingerprint
        return PromptMasks.layout(masks, hidden, attention_mask)


def _numbers(tokens: Tensor) -> Tensor:
    """int64 [batch, n]: the sum of each embedding's bits."""
    tokens = tokens.detach()
    # bits as integers: their sum does not depend on the order of addition, and NaN equals itself
    return tokens.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tokens.element_size()]).sum(-1)
