"""A model whose image tokens the caller marks, and a check that each prefill is the marked one."""

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
from tokenprune.engine.calls.generate import generation
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.under_way import CallsBefore
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.errors import InputError


class _Now(threading.local):
    """Of one thread.

    Attributes:
        inside: whether the model's forward is under way.
        mask: the attention mask that it was called with.
        embeds: the embeddings that it was called with in place of ids.
        prompt: the latest prompt of a plain forward, see `_OfPrompt`.
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
        self._marks = _OfPrompt(image_tokens, grid=grid, image_number=image_number)
        self._now = _Now()
        self._before = CallsBefore(model, "forward")
        self._vision = vision or VisionSource()
        self.tower_layers = self._vision.layers

    def offers(self) -> frozenset[type[Read]]:
        """The reads that the caller's source answers."""
        return frozenset(self._vision.answers)

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """Look at the model's attention mask, which its decoder may be given in another form."""
        with shadowed(self.decoder, "forward", self._forward):
            self._before.note()
            yield self

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now, inputs = self._now, arguments(self.decoder, args, kwargs)
        now.inside, now.mask = True, padding_mask(inputs)
        now.embeds = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else None
        try:
            return original(*args, **kwargs)
        finally:  # of this call only: the decoder inside may be called alone next
            now.inside, now.mask, now.embeds = False, None, None

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """The caller's, for the prefills that they are for.

        Raises:
            InputError: embeddings of more positions than are marked, of which any may be new. Ids of more are what was
                generated without a cache.
        """
        embeds, marked = self._now.embeds, self._marks.image_tokens
        if isinstance(embeds, Tensor) and isinstance(marked, Tensor) and embeds.shape[1] > marked.shape[-1]:
            raise InputError(
                f"image_tokens: a mask over {marked.shape[-1]} positions was given, but inputs_embeds of "
                f"{embeds.shape[1]}, where others may stand before the prompt (as virtual tokens of PEFT's prompt "
                "tuning do); mark the image tokens over the whole input"
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
        """See `VisionCapture`: whether the model's forward on the stack began before the context was open."""
        return not self._now.inside and self._before.under_way()

    def padding(self) -> Tensor | None:
        """See `VisionCapture`."""
        return self._now.mask

    def provide(self, read: Read) -> Any:
        """The caller's source answers."""
        return self._vision.provide(read)


@dataclass(frozen=True)
class _OfPrompt(PromptMasks):
    """Marks of one prompt; the same tokens with generated ones behind them are that prompt still.

    It is known again by its text: the sum of each embedding, read as whole numbers, where no image token stands.

    Attributes:
        seen: where `prompt` is kept: int64 [batch, prompt], what the prompt that was seen last looks like.
        others: whether prefills of other prompts are to be expected, as those of a second stream in `generate`; they
            are text alone.
    """

    seen: Any = None
    others: bool = False

    def layout(self, hidden: Tensor, attention_mask: Tensor | None) -> SequenceLayout:
        """See `PromptMasks.layout`.

        Raises:
            InputError: masks that do not fit the input, or another prompt than theirs.
        """
        image, (batch, length) = self.image_tokens, hidden.shape[:2]
        if not isinstance(image, Tensor) or image.dim() != 2 or not len(image) or batch % len(image):
            return super().layout(hidden, attention_mask)  # which says what is wrong
        rows, own = image.shape
        looks = self._looks(hidden)
        same = self.seen.prompt is not None and torch.equal(looks, self.seen.prompt)
        if self.others and not same:
            text = torch.zeros(batch, length, dtype=torch.bool)
            return PromptMasks(text, attention_mask=self.attention_mask).layout(hidden, attention_mask)
        if length != own and not same:
            raise InputError(
                f"image_tokens: a mask of shape {[rows, own]} was given for a forward of {[batch, length]}, which is "
                "neither its prompt nor that with generated tokens behind it; masks cover the expanded prompt: prune "
                "this one in a context with a mask of its own, all False where it is text alone"
            )
        groups = looks.reshape(rows, batch // rows, -1)
        if rows > 1 and not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise InputError(
                f"image_tokens: a mask of {rows} rows was given for a batch of {batch}, which is not each of {rows} "
                "prompts repeated in turn; give a mask with a row for each"
            )
        self.seen.prompt = looks
        return super().layout(hidden, attention_mask)

    def _looks(self, hidden: Tensor) -> Tensor:
        rows, own = self.image_tokens.shape
        # bits as whole numbers: their sum does not depend on the order of adding, and NaN equals itself
        tokens = hidden[:, :own].detach()
        numbers = tokens.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tokens.element_size()]).sum(-1)
        image = self.image_tokens.to(hidden.device, torch.bool).repeat_interleave(len(hidden) // rows, 0)
        # text alone: image features are computed in each call, and need not come out the same to the last bit
        return numbers.masked_fill(image[:, : numbers.shape[1]], 0)
