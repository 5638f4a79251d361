"""VScan (Zhang et al., "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
https://arxiv.org/abs/2505.22654)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tokenprune import AttentionFrom, Decision, Keep, Merge, MergeGroup, Shape, Stage, Tokens
from tokenprune.core.apportion import top_by_image
from tokenprune.core.reads import ClsAttention, Crops, Embeddings, ReceivedAttention
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.authors_grid import check_authors_grid
from tokenprune_strategies.ops.falling_stages import layers_of
from tokenprune_strategies.vscan.options import TwoVariants
from tokenprune_strategies.vscan.scans import Windows, best_of_rest, merge_weights


class VScan(TwoVariants):
    """Keep the patches that a shallow tower layer attends to in each window of the image, and those that a deep one
    attends to anywhere; merge the others into these; in the middle of the decoder keep what the query row attends to.

    In the variant for LLaVA the tower's attention is that of [CLS], in the one for Qwen2.5-VL what a patch receives.

    Ours: any grid and any number of tokens (see `faithful`), and layers as shares of the depth; batch rows, images and
    crops are independent.
    """

    name = "vscan"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Tower and decoder. Raises OptionError for numbers that grow, IncompatibleError for too few layers."""
        variant = self.variant(shape)
        qwen, shallow = variant == "qwen", self.shallow_layer(shape.tower_layers)
        # attention of [CLS] at the second-to-last tower layer, or that received in the last
        cls, received = (ClsAttention(shallow), ClsAttention(-2)), (ReceivedAttention(shallow), ReceivedAttention(-1))
        policy: Positions = self.options.positions or ("keep" if qwen else "renumber")
        first, *counts = self.counts(shape.image_tokens, variant)
        tower = (*(received if qwen else cls), Embeddings(), *shape.offered(Crops()))
        yield Stage("scan", 0, first, tower, positions=policy)
        # attention of the next layer, computed ahead; of queries and keys before their rotation with qwen
        query = "last" if self.options.faithful else self.options.query
        ahead = AttentionFrom(query, self.options.query_reduce, layer="next", rotary=not qwen)
        layers = layers_of(self.options.layers, shape.layers, self.name)
        for number, (layer, count) in enumerate(zip(layers, counts, strict=True), 1):
            yield Stage(f"drop {number}", layer, count, (ahead,), positions=policy)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Scan and merge in each crop; later, keep the most attended tokens of each image."""
        if stage.layer:
            # (4) softmax over all keys, mean over heads
            return Keep.where(top_by_image(tokens, tokens.attention), scores=tokens.attention)
        local, everywhere = (tokens.read(read) for read in stage.reads[:2])
        qwen, groups, rows = isinstance(stage.reads[0], ReceivedAttention), [], tokens.images_by_row()
        if self.options.faithful:
            smallest = "one image of at least 4 x 4 tokens" if qwen else "one image of 24 x 24 patches"
            check_authors_grid(self.name, tokens, rows, lambda h, w: min(h, w) >= 4 if qwen else h == w == 24, smallest)
        scores = everywhere.masked_fill(~tokens.active, float("-inf"))
        if all(crop.quota == len(crop) for images in rows for crop in images):
            return Keep.where(tokens.active, scores=scores)
        for crop in (crop for images in rows for crop in images if crop.quota):
            own, cells = (crop.row, crop.index), tokens.on_host("grid")[crop.row, crop.index_on_host]
            windows = Windows.of(cells, tokens.device, fixed_size=qwen)
            # (1) local scan: half of the tokens, the same number in each window (qwen: at most that, rounded up)
            half = (self.amounts(len(crop))[0] if self.options.faithful else crop.quota) // 2
            room = -(-half // len(windows)) if qwen else half // len(windows)
            chosen = windows.best(local[own], half, room)
            # (2) global scan: the others, from all windows
            best = best_of_rest(everywhere[own], chosen, crop.quota - len(chosen))
            kept = torch.cat((chosen, best)).sort().values
            # (3) every dropped token is merged into the kept one that its projected state is most similar to
            weights = merge_weights(tokens.embeddings[own], kept)
            groups.append(MergeGroup(crop.row, crop.index[kept], crop.index, weights))
        return Merge.from_groups(tokens, groups, scores=scores)
