"""One decoder input for prompts about several images, and the reads of their towers, aligned with its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.reads import Pixels, Read
from tokenprune.errors import InputError
from tokenprune_adapters.llava.prompt import DecoderInputs
from tokenprune_adapters.segmentation.data import SegmenterInputs


def joined(parts: Sequence[SegmenterInputs], pad_id: int, continues: bool = False) -> SegmenterInputs:
    """The inputs about several images as one, whose rows follow each other.

    Args:
        parts: of each image, from `Segmenter.inputs_of`; at least one.
        pad_id: id that fills shorter rows. Their embeddings are filled with zeros, which the decoder masks.
        continues: whether the model continues the prompts: then shorter rows are filled on the left.
    """
    if len(parts) == 1:
        return parts[0]
    prompts = [text for part in parts for text in part.prompts]
    texts = {wording: [row for part in parts for row in part.texts[wording]] for wording in parts[0].texts}
    sequence = _sequence([part.sequence for part in parts], pad_id, continues)
    templates = [template for part in parts for template in part.templates]
    return SegmenterInputs(prompts, None, sequence, texts, templates, tuple(parts))


def _sequence(parts: Sequence[DecoderInputs], pad_id: int, continues: bool) -> DecoderInputs:
    length = max(part.token_ids.shape[1] for part in parts)

    def filled(name: str, value: int = 0) -> Tensor:
        rows = []
        for part in parts:
            tensor: Tensor = getattr(part, name)
            missing = length - tensor.shape[1]
            sides = (missing, 0) if continues else (0, missing)
            # `pad` counts axes from the last one: the width of embeddings stays
            rows.append(functional.pad(tensor, (*(0, 0) * (tensor.dim() - 2), *sides), value=value))
        return torch.cat(rows)

    mask = filled("attention_mask")
    positions = None
    if any(part.positions is not None for part in parts):
        # As `splice` numbers them: from the first token of a row on, over masked image tokens too.
        steps = torch.arange(length, device=mask.device).expand_as(mask)
        positions = (steps - mask.argmax(1, keepdim=True)).clamp(min=0)
    return DecoderInputs(
        inputs_embeds=filled("inputs_embeds"),
        attention_mask=mask,
        token_ids=filled("token_ids", pad_id),
        image_tokens=filled("image_tokens"),
        seg=filled("seg"),
        mask_query=filled("mask_query"),
        positions=positions,
    )


def joined_value(read: Read, values: Sequence[Any]) -> Any:
    """The answer to a read for rows about several images, from the answers for the rows of each.

    Args:
        read: the read.
        values: one of each image: tensors [rows, N, …] of any N, or tuples of them, which are filled with zeros up to
            the largest N; or functions, which are the same for all.

    Raises:
        InputError: they have no token axis, and differ in size.
    """
    first = values[0]
    if len(values) == 1 or (callable(first) and not isinstance(first, Tensor)):
        return first
    if isinstance(first, tuple):
        return tuple(joined_value(read, members) for members in zip(*values, strict=True))
    longest = max(value.shape[1] for value in values)
    filled = [functional.pad(value, (*(0, 0) * (value.dim() - 2), 0, longest - value.shape[1])) for value in values]
    if len({value.shape[1:] for value in (values if _whole(read) else filled)}) > 1:
        sizes = " and ".join(sorted({str(list(value.shape[1:])) for value in values}))
        raise InputError(f"{read} gives {sizes} for images of one batch, expected one size; run them one by one")
    return torch.cat(filled)


def _whole(read: Read) -> bool:
    """Whether a value has no axis that may be filled: pictures."""
    return isinstance(read, Pixels)
