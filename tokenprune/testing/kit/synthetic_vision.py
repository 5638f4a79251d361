"""A synthetic vision side: random values for reads that tiny decoders do not provide, from each row's own seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.core.reads import Read, vision
from tokenprune.core.reads.base import kinds_of_reads
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.testing.kit.cases import SyntheticBatch, drawn

CHANNELS, PIXELS, TOWER_LAYERS = 8, 56, 4
_WEIGHTS = ("cls_attention", "received_attention")


def synthetic_vision_of(made: SyntheticBatch, width: int) -> VisionSource:
    """A source that provides every read of a vision side.

    Args:
        made: the batch; a row's answers depend on its seed and images only.
        width: hidden size of the decoder, for the projector.
    """
    kinds = [kind for kind in kinds_of_reads() if kind.__module__ == vision.__name__]
    return VisionSource({kind: _answer(kind.field, made, width) for kind in kinds}, TOWER_LAYERS)


def _answer(field: str, made: SyntheticBatch, width: int) -> Callable[[Any], Any]:
    return lambda read: _value(field, read, made, width)


def _value(field: str, read: Read, made: SyntheticBatch, width: int) -> Any:
    seeds = [row.seed for row in made.rows]
    if field == "project":
        return lambda features: features @ drawn("projector", 0, CHANNELS, width)
    if field == "crops":  # an image is one crop
        return made.layout.gather_slots(made.layout.image_number)
    if field == "cls_features":
        return _per_crop(repr(read), made)
    if field == "cls_query":
        return _per_crop(repr(read), made)
    if field == "clip_text_embeddings":
        texts = [drawn("texts", seed, 1 + seed % 3, CHANNELS) for seed in seeds]
        exist = [torch.ones(len(text), dtype=torch.bool) for text in texts]
        return pad_sequence(texts, batch_first=True), pad_sequence(exist, batch_first=True)
    if field == "pixels":
        draws = torch.stack([drawn("pixels", seed, PIXELS, PIXELS, 3) for seed in seeds])
        return (draws * 40 + 128).clamp(0, 255).to(torch.uint8)
    if field in _WEIGHTS:
        return _per_token(repr(read), made, 1).squeeze(-1).abs()
    return _per_token(repr(read), made, CHANNELS)


def _per_token(what: str, made: SyntheticBatch, channels: int) -> Tensor:
    """float32 [batch, N, channels], zeros where a row has no token."""
    counts = made.layout.counts.tolist()
    rows = [drawn(what, row.seed, count, channels) for row, count in zip(made.rows, counts, strict=True)]
    return pad_sequence(rows, batch_first=True)


def _per_crop(what: str, made: SyntheticBatch) -> Tensor:
    """float32 [batch, N, channels], the same for all tokens of an image."""
    images = made.layout.gather_slots(made.layout.image_number)
    tables = torch.stack([drawn(what, row.seed, 4, CHANNELS) for row in made.rows])
    found = tables.gather(1, images.clamp(min=0)[..., None].expand(-1, -1, CHANNELS))
    return found.masked_fill((images < 0)[..., None], 0)
