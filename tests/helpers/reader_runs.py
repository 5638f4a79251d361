"""A strategy that notes what it reads, on a small batch of two rows of different lengths."""

from __future__ import annotations

import torch

from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH = 5, 32


class Reader(Strategy):
    """Keeps some tokens from layer 1 on, then reads without changing anything, and notes what it was given."""

    name = "reader"

    def __init__(self, kept, reads, positions="keep", rater=None):
        super().__init__()
        self.kept, self.reads, self.positions, self.rater, self.found = kept, reads, positions, rater, {}

    def stages(self, shape):
        yield Stage("keep", 1)
        for layer, reads in self.reads.items():
            yield Stage(f"read {layer}", layer, reads=reads)

    def choose(self, stage, tokens):
        if stage.name == "keep":
            if self.rater is not None:
                tokens.mark("raters", self.rater(tokens))
            return Keep.where(self.kept)
        self.found[stage.layer] = {read: tokens.read(read) for read in stage.reads}
        self.tokens = tokens
        return Keep.where(tokens.active)


def batch(seed, padding):
    """Two rows of different lengths: embeddings, image tokens, attention mask, kept tokens."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, slice(0, 5) if padding == "left" else slice(15, 20)] = 0
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[0, 3:13], image[1, 7:13] = True, True
    exists = torch.arange(10) < torch.tensor([[10], [6]])
    kept = exists & (torch.rand(2, 10, generator=draw) < 0.6)
    return torch.randn(2, 20, WIDTH, generator=draw), image, mask, kept


def run(strategy, seed, padding, attention="sdpa", counted=False, **options):
    """`counted`: with position ids that leave padding out, as `generate` gives them."""
    model = tiny_llama(LAYERS, kv_heads=2, attention=attention, seed=seed)
    embeds, image, mask, _ = batch(seed, padding)
    ids = (mask.cumsum(1) - 1).clamp(min=0) if counted else None
    with torch.no_grad(), prune(model, strategy, image_tokens=image, **options) as found:
        output = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=True)
    return model, output, found
