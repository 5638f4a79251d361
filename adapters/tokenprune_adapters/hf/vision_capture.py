"""Following a vision-language model's calls: where its image tokens stand, what its tower computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.layout import true_positions
from tokenprune.core.reads import (
    Projector,
    Read,
)
from tokenprune.engine.calls.under_way import CallsBefore
from tokenprune.engine.interface.bound_model import VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.errors import InputError, PluginError, UnsupportedError
from tokenprune_adapters.hf.grid_cells import Cells
from tokenprune_adapters.hf.tower_recording import Encoded, TowerRecording

if TYPE_CHECKING:
    from tokenprune_adapters.hf.bound_model import BoundTransformersModel

METHODS = {"image": "get_image_features", "video": "get_video_features"}


class _Now(threading.local):
    """What one thread's call of the model has shown so far."""

    inside = False
    encoding = False
    ids: Tensor | None = None
    mask: Tensor | None = None
    flat: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        self.ahead: dict[str, Encoded] = {}
        self.encoded: dict[str, Encoded] = {}


class TransformersCapture(VisionCapture):
    """Follows a model in one context; what a forward saw is forgotten when it ends, and is its thread's alone.

    `generate` may encode images ahead and hand them to its forwards (`mm_encoder_outputs`); what was seen then is kept
    until more is encoded ahead.
    """

    def __init__(self, bound: BoundTransformersModel, reads: Collection[Read]) -> None:
        self.bound = bound
        self._tower = TowerRecording(bound, [read for read in reads if type(read) in bound.offers()])
        self._now = _Now()
        self.before = CallsBefore(bound.base, "forward")  # calls of the model that are not of this context

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward."""
        self._called(args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self._returned()

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note ids, padding and what was encoded ahead."""
        inputs, name, now = arguments(self.bound.base, args, kwargs), self.bound.name, self._now
        if inputs.get("pixel_values_videos") is not None and self.bound.family.videos is None:
            raise UnsupportedError(f"{name} was given a video (pixel_values_videos), but its family has images only")
        now.inside, now.ids, now.mask = True, self._given_ids(inputs), padding_mask(inputs)
        handed = {key for key, value in (inputs.get("mm_encoder_outputs") or {}).items() if value is not None}
        now.encoded = {key: now.ahead[key] for key in METHODS if key in handed and key in now.ahead}
        for modality, encoded in now.encoded.items():
            self._numbers(modality, encoded)

    def _given_ids(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The ids; where the model was given embeddings and images, the placeholders among them, as it finds them."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")  # the last: encoded ahead by `generate`
        if ids is not None or not isinstance(embeds, Tensor) or all(inputs.get(name) is None for name in given):
            return ids
        found = torch.full(embeds.shape[:2], -1, device=embeds.device)
        table = self.bound.base.get_input_embeddings()
        for token in self.bound.token_ids.values():
            if token is not None:
                row = table(torch.tensor(token, device=embeds.device)).to(embeds)
                found[(embeds == row).all(-1)] = token
        return found

    def _returned(self) -> None:
        now = self._now
        now.inside, now.ids, now.mask, now.encoded = False, None, None, {}

    def encode(self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the tower and the projector, and keep what the strategy wants to read."""
        now = self._now
        if now.encoding:  # Qwen3-VL's videos go through its method for images
            return original(*args, **kwargs)
        now.encoding = True
        as_tuple = kwargs.get("return_dict", getattr(self.bound.base.config, "return_dict", True)) is False
        try:
            output, encoded = self._tower.encode(
                modality, original, args, {**kwargs, "return_dict": True} if as_tuple else kwargs
            )
        finally:
            now.encoding = False
        if now.inside:
            now.encoded[modality] = encoded
            self._numbers(modality, encoded)  # before the model itself complains, in other words
        else:
            now.ahead[modality] = encoded
        return output.to_tuple() if as_tuple else output

    # the prefill -----------------------------------------------------------------------------------------------------

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """See `VisionCapture.prompt_masks`.

        Raises:
            InputError: the model was called without ids, or placeholders and image features differ in number.
        """
        now, name = self._now, self.bound.name
        ids = now.ids
        if ids is None:
            raise InputError(f"{name} was called without input_ids; call it with them, or give image_tokens=")
        # for each position, the number of its token among all that were encoded: images first, then videos
        flat = torch.full(ids.shape, -1, device=ids.device)
        start, parts = 0, []
        for modality, token in self.bound.token_ids.items():
            if token is None:
                continue
            where, encoded = ids.eq(token), now.encoded.get(modality)
            if encoded is not None:
                flat[where] = self._numbers(modality, encoded).to(ids.device) + start
                parts.append(encoded.cells)
                start += len(encoded.cells)
            elif where.any():
                raise InputError(
                    f"{name}: the prompt holds {int(where.sum())} {modality} tokens, but no {modality} was encoded in "
                    "this context; pass the pixels, or give image_tokens="
                )
        cells = Cells.joined(parts)
        now.flat = flat
        # text looks up token 0, and is masked below; the row added to each table is for prompts without images
        found = flat.clamp(min=0)
        separator = torch.cat((cells.separator, torch.zeros(1).bool())).to(ids.device)[found]
        now.tokens = (flat >= 0) & ~separator
        if now.mask is not None:  # a placeholder under padding is padding
            now.tokens &= now.mask[:, -ids.shape[1] :].to(ids.device).bool()
        grid, image = (
            torch.cat((value, value.new_zeros(1, *value.shape[1:]))).to(ids.device)[found]
            for value in (cells.grid, cells.image)
        )
        number = _numbered(torch.where(now.tokens, image, -1))
        grid = torch.where(now.tokens[..., None], grid, -1)
        return PromptMasks(now.tokens, queries, grid, number, now.mask)

    def missed(self) -> bool:
        """See `VisionCapture.missed`: whether the model's forward on the stack began before the context was open."""
        return not self._now.inside and self.before.under_way()

    def padding(self) -> Tensor | None:
        """See `VisionCapture.padding`."""
        return self._now.mask

    def later(self) -> Tensor | None:
        """See `VisionCapture.later`."""
        return self.prompt_masks({}).image_tokens if self._now.encoded else None

    def _numbers(self, modality: str, encoded: Encoded) -> Tensor:
        """For each placeholder, row by row, the number of its token; rows may be repeated for returned sequences."""
        ids = self._now.ids
        if ids is None:
            return torch.zeros(0, dtype=torch.int64)
        counts, tokens = ids.eq(self.bound.token_ids[modality]).sum(1), len(encoded.cells)
        total = int(counts.sum())
        repeats = total // max(tokens, 1)
        once = counts[:: max(repeats, 1)]
        if int(once.sum()) != tokens or not torch.equal(once.repeat_interleave(repeats), counts):
            raise InputError(
                f"{self.bound.name}: the prompt holds {total} {modality} tokens, but its {modality}s give {tokens} "
                "features; use the model's own processor to make the prompt"
            )
        # copies of a row stand next to each other, and all show the tokens of the one image that was encoded
        rows = torch.split(torch.arange(tokens), once.tolist())
        return torch.cat([row for row in rows for _ in range(repeats)])

    def provide(self, read: Read) -> Any:
        """See `VisionCapture.provide`."""
        if isinstance(read, Projector):
            return self.bound.project
        now = self._now
        parts = [now.encoded[modality].values.get(read) for modality in METHODS if modality in now.encoded]
        if not all(isinstance(part, Tensor) for part in parts):
            raise PluginError(
                f"{read} was not declared when the context was opened, so {self.bound.name}'s tower was not read; "
                "declare the same reads for every shape"
            )
        values = torch.cat([part for part in parts if part is not None])
        slots = true_positions(now.tokens)
        index = now.flat.gather(1, slots.clamp(min=0)).to(values.device)
        lined = values[index]
        return lined.masked_fill((slots < 0).to(values.device).view(*slots.shape, *[1] * (lined.dim() - 2)), 0)


def _numbered(image: Tensor) -> Tensor:
    """Number the pictures of every row 0, 1, … in the order in which they come; −1 stays."""
    result = torch.full_like(image, -1)
    for row, numbers in enumerate(image):
        where = (numbers >= 0).nonzero().flatten()
        if len(where):
            found = numbers[where]
            changes = torch.cat((found.new_zeros(1), (found[1:] != found[:-1]).long()))
            result[row, where] = changes.cumsum(0)
    return result
