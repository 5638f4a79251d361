"""Tiny decoders, and random layouts for them, that schedules are run on."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, StaticCache

from tokenprune.core.layout import SequenceLayout
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH = 4, 32


MODELS = {
    (attention, kv): tiny_llama(LAYERS, kv_heads=kv, attention=attention)
    for attention in ("sdpa", "eager")
    for kv in (4, 2)
}


CACHES = ("dynamic", "static")


def empty_cache(kind: str, model: torch.nn.Module, length: int) -> Cache:
    """An empty cache of one of `CACHES`; a static one for `length` tokens per row."""
    return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=length)


def random_layout(seed: int, batch: int, padding: str) -> tuple[SequenceLayout, torch.Tensor]:
    """A layout with image tokens anywhere, text first (and, where padded, rows of different lengths), and its
    position ids."""
    draw = torch.Generator().manual_seed(seed)
    length = int(torch.randint(6, 16, (1,), generator=draw))
    image = torch.rand(batch, length, generator=draw) < 0.6
    valid = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        pad = 0 if padding == "none" else int(torch.randint(0, length - 4, (1,), generator=draw))
        if padding == "left":
            valid[row, :pad] = False
            image[row, pad] = False
        else:
            valid[row, length - pad :] = False
            image[row, 0] = False
    image &= valid
    ids = (valid.long().cumsum(1) - 1).clamp(min=0)
    return SequenceLayout.from_mask(image, valid), ids
