"""Observation of a vision-language model's calls: its image tokens, and the reads of its tower."""

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
from tokenprune.engine.calls.call_stack import EarlierCalls
from tokenprune.engine.interface.bound_model import VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.errors import InputError, PluginError, UnsupportedError
from tokenprune_adapters.hf.arrangements.grid_cells import Cells
from tokenprune_adapters.hf.tower_recording import Encoded, TowerRecording

if TYPE_CHECKING:
    from tokenprune_adapters.hf.bound_model import BoundTransformersModel

METHODS = {"image": "get_image_features", "video": "get_video_features"}
PIXELS = ("pixel_values", "mm_encoder_outputs")
"""How the names of arguments with images or videos begin."""


def several_of_compressed(name: str) -> str:
    """Why a video that has lost tokens has one sequence: the message of an error."""
    return (
        f"{name}: transformers mixes up the tokens that a video has lost (video_compression_mask) where a prompt has "
        "several sequences or beams; generate one"
    )


class _ThreadState(threading.local):
    """Data of the current call of the model in one thread."""

    inside = False
    encoding = False
    ids: Tensor | None = None
    mask: Tensor | None = None
    flat: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        self.ahead: dict[str, Encoded] = {}
        self.encoded: dict[str, Encoded] = {}
        self.kept: dict[str, Tensor | None] = {}  # VideoLLaMA 3 drops tokens of a video that equal the frame before


class TransformersCapture(VisionCapture):
    """Observes a model in one context. Data of a forward is kept per thread, and discarded when the forward ends.

    `generate` may encode images before its forwards (`mm_encoder_outputs`); that data is kept until images are encoded
    again.
    """

    def __init__(self, bound: BoundTransformersModel, reads: Collection[Read]) -> None:
        self.bound = bound
        self._tower = TowerRecording(bound, [read for read in reads if type(read) in bound.offers()])
        self._state = _ThreadState()
        self.before = EarlierCalls(bound.base, "forward")  # calls of the model that began before the context

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward."""
        self._begin_call(args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            self._end_call()

    def _begin_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record ids, padding and images that were encoded before the forward."""
        inputs, name, state = arguments(self.bound.base, args, kwargs), self.bound.name, self._state
        if inputs.get("pixel_values_videos") is not None and self.bound.family.videos is None:
            raise UnsupportedError(f"{name} got a video (pixel_values_videos), but its family supports images only")
        if self.bound.family.one_token and all(inputs.get(f"pixel_values{end}") is not None for end in ("", "_videos")):
            raise UnsupportedError(
                f"{name} got images and videos in one call, but one token marks both, so that the model cannot tell "
                "them apart; call it for each"
            )
        state.inside, state.ids, state.mask = True, self._ids(inputs), padding_mask(inputs)
        state.kept = {modality: inputs.get(f"{modality}_compression_mask") for modality in METHODS}
        handed = {key for key, value in (inputs.get("mm_encoder_outputs") or {}).items() if value is not None}
        for modality in METHODS:
            if modality in handed and modality in state.ahead:
                self._take(modality, state.ahead[modality])

    def _take(self, modality: str, encoded: Encoded) -> None:
        """The images or videos of the current call; raises a clearer error than the model would."""
        state = self._state
        kept = state.kept[modality]
        if kept is not None and len(kept) > len(encoded.cells):  # repeated for several sequences, tokens one by one
            if not kept.all():
                raise UnsupportedError(several_of_compressed(self.bound.name))
            kept = None
        state.encoded[modality] = encoded.only(kept)
        self._token_numbers(modality, state.encoded[modality])

    def _ids(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The input ids; with embeddings and images instead, ids of the placeholders only, found as the model does."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = any(value is not None and name.startswith(PIXELS) for name, value in inputs.items())
        if ids is not None or not isinstance(embeds, Tensor) or not given:
            return ids
        found = torch.full(embeds.shape[:2], -1, device=embeds.device)
        table = self.bound.base.get_input_embeddings()
        for token in self.bound.token_ids.values():
            if token is not None:
                row = table(torch.tensor(token, device=embeds.device)).to(embeds)
                found[(embeds == row).all(-1)] = token
        return found

    def _end_call(self) -> None:
        state = self._state
        state.inside, state.ids, state.mask, state.encoded = False, None, None, {}

    def encode(self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the tower and the projector, and record the data of the strategy's reads."""
        state = self._state
        if state.encoding:  # Qwen3-VL's method for videos calls the one for images
            return original(*args, **kwargs)
        state.encoding = True
        as_tuple = kwargs.get("return_dict", getattr(self.bound.base.config, "return_dict", True)) is False
        try:
            output, encoded = self._tower.encode(
                modality, original, args, {**kwargs, "return_dict": True} if as_tuple else kwargs
            )
        finally:
            state.encoding = False
        if state.inside:
            self._take(modality, encoded)
        else:
            state.ahead[modality] = encoded
        return output.to_tuple() if as_tuple else output

    # the prefill -----------------------------------------------------------------------------------------------------

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """See `VisionCapture.prompt_masks`.

        Raises:
            InputError: the model was called without ids, or the numbers of placeholders and image features differ.
        """
        state, name = self._state, self.bound.name
        ids = state.ids
        if ids is None:
            raise InputError(f"{name} was called without input_ids; pass them, or use image_tokens=")
        # for each position, the number of its token among all encoded ones: images first, then videos
        flat = torch.full(ids.shape, -1, device=ids.device)
        start, parts = 0, []
        seen = {self.bound.token_ids[modality] for modality in state.encoded}
        for modality, token in self.bound.token_ids.items():
            if token is None:
                continue
            where, encoded = ids.eq(token), state.encoded.get(modality)
            if encoded is not None:
                flat[where] = self._token_numbers(modality, encoded).to(ids.device) + start
                parts.append(encoded.cells)
                start += len(encoded.cells)
            elif where.any() and token not in seen:
                raise InputError(
                    f"{name}: the prompt has {int(where.sum())} {modality} tokens, but no {modality} was encoded in "
                    "this context; pass the pixels, or use image_tokens="
                )
        cells = Cells.joined(parts)
        state.flat = flat
        # text indexes token 0 and is masked below; the row added to each table is for prompts without images
        found = flat.clamp(min=0)
        separator = torch.cat((cells.separator, torch.zeros(1).bool())).to(ids.device)[found]
        state.tokens = (flat >= 0) & ~separator
        if state.mask is not None:  # a masked placeholder is padding
            state.tokens &= state.mask[:, -ids.shape[1] :].to(ids.device).bool()
        grid, image = (
            torch.cat((value, value.new_zeros(1, *value.shape[1:]))).to(ids.device)[found]
            for value in (cells.grid, cells.image)
        )
        number = _renumbered(torch.where(state.tokens, image, -1))
        grid = torch.where(state.tokens[..., None], grid, -1)
        return PromptMasks(state.tokens, queries, grid, number, state.mask)

    def missed(self) -> bool:
        """See `VisionCapture.missed`."""
        return not self._state.inside and self.before.in_progress()

    def padding(self) -> Tensor | None:
        """See `VisionCapture.padding`."""
        return self._state.mask

    def later(self) -> Tensor | None:
        """See `VisionCapture.later`."""
        return self.prompt_masks({}).image_tokens if self._state.encoded else None

    def _token_numbers(self, modality: str, encoded: Encoded) -> Tensor:
        """For each placeholder, in row-major order, the number of its token; rows may be repeated copies."""
        ids = self._state.ids
        if ids is None:
            return torch.zeros(0, dtype=torch.int64)
        counts, tokens = ids.eq(self.bound.token_ids[modality]).sum(1), len(encoded.cells)
        total = int(counts.sum())
        repeats = total // max(tokens, 1)
        once = counts[:: max(repeats, 1)]
        if int(once.sum()) != tokens or not torch.equal(once.repeat_interleave(repeats), counts):
            raise InputError(
                f"{self.bound.name}: the prompt has {total} {modality} tokens, but its {modality}s have {tokens} "
                "features; prepare the prompt with the model's processor"
            )
        # copies of a row are adjacent, and share the tokens of an image that was encoded once
        rows = torch.split(torch.arange(tokens), once.tolist())
        return torch.cat([row for row in rows for _ in range(repeats)])

    def provide(self, read: Read) -> Any:
        """See `VisionCapture.provide`."""
        if isinstance(read, Projector):
            return self.bound.project
        state = self._state
        parts = [state.encoded[modality].values.get(read) for modality in METHODS if modality in state.encoded]
        if not all(isinstance(part, Tensor) for part in parts):
            raise PluginError(
                f"{read} was not declared when the context was opened, so {self.bound.name}'s tower did not record it; "
                "declare the same reads for every shape"
            )
        values = torch.cat([part for part in parts if part is not None])
        slots = true_positions(state.tokens)
        index = state.flat.gather(1, slots.clamp(min=0)).to(values.device)
        aligned = values[index]
        return aligned.masked_fill((slots < 0).to(values.device).view(*slots.shape, *[1] * (aligned.dim() - 2)), 0)


def _renumbered(image: Tensor) -> Tensor:
    """Number the images of each row 0, 1, … in order; −1 stays."""
    result = torch.full_like(image, -1)
    for row, numbers in enumerate(image):
        where = (numbers >= 0).nonzero().flatten()
        if len(where):
            found = numbers[where]
            changes = torch.cat((found.new_zeros(1), (found[1:] != found[:-1]).long()))
            result[row, where] = changes.cumsum(0)
    return result
