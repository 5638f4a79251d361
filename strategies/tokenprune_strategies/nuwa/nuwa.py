"""Nüwa (Huang et al., "Nüwa: Mending the Spatial Integrity Torn by VLM Token Pruning",
https://arxiv.org/abs/2602.02951)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field

from tokenprune import AttentionFrom, Decision, Keep, Merge, MergeGroup, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.budget import Ladder
from tokenprune.core.options import QUERY, QUERY_REDUCE, Amount, Depth, QueryReduce, layer_of, tokens_of
from tokenprune.core.reads import ClsAttention, Projector, TowerFeatures, TowerStates
from tokenprune.core.stage import Positions
from tokenprune_strategies.nuwa.merging import Regions, anchors_of, merge_weights
from tokenprune_strategies.ops.before_projector import projected
from tokenprune_strategies.ops.falling_stages import falling


class Nuwa(Strategy):
    """Keep anchors in all parts of the image, some of which take in what is similar and near; later prune by the text.

    Ours: every image has its own number of anchors (the authors divide one over a batch), on any grid: distances are in
    proportion to its diagonal, regions at odd edges are smaller; an image that keeps all its tokens is unchanged; the
    layer is a share of the depth; a projector that does not work token by token gets the tokens merged behind it.
    """

    name = "nuwa"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: tuple[Amount, Amount] = Field(
            (0.1945, 0.0278), description="image tokens before the decoder, and at `layer`: number or share of N"
        )
        layer: Depth = Field(0.5, description="layer of the second number: layer (int) or share of the depth (float)")
        per_region: int = Field(1, ge=1, le=4, description="candidates of 2 × 2 cells, at least")
        distance: float = Field(280, gt=0, description="squared reach of merging, in cells of a 24 × 24 grid")
        quantile: float = Field(0.55, ge=0, le=1, description="of anchors' attention, from which on they stay alone")
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        faithful: bool = Field(
            False, description="as in the authors' code: the last row asks, odd edges and other grids are as there"
        )
        positions: Positions = Field("keep", description="position policy: keep (as in the authors' code) or renumber")

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        return dict.fromkeys(("query", "query_reduce"), "with faithful=True") if self.options.faithful else {}

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Merging, then pruning. Raises OptionError for a second number above the first, or a missing layer."""
        options, depth = self.options, shape.layers
        merged, kept = falling(self.name, [tokens_of(amount, shape.image_tokens) for amount in options.keep])
        # attention of the second-to-last tower layer, similarity of the mean state of its last third
        seen = (ClsAttention(-2), TowerStates(2 / 3, -1))
        yield Stage("merge", 0, merged, (*seen, *shape.offered(TowerFeatures(), Projector())))
        attention = AttentionFrom("last" if options.faithful else options.query, options.query_reduce)
        yield Stage("prune", layer_of(options.layer, depth, self.name, least=1), kept, (attention,))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Merge image by image; later keep the best of a row."""
        if stage.name == "prune":  # (6) by attention in the layer before, mean over heads
            return Keep.top(tokens.attention, tokens.target)
        options, groups = self.options, []
        for image in tokens.images():
            row, index, attention = image.row, image.index, tokens.cls_attention[image.row, image.index]
            regions = Regions.of(tokens.on_host("grid")[row, image.index_on_host], faithful=options.faithful)
            # (1) candidates: of every 2 × 2 cells those that [CLS] attends to most; (2) anchors: the best candidates
            candidates = regions.candidates(image.quota, options.per_region, faithful=options.faithful)
            anchors = anchors_of(attention, regions, candidates, image.quota)
            # (3) similarity times closeness; (4) anchors above the quantile stay alone, the others take patches in
            reach = options.distance * (1 if options.faithful else regions.scale)
            stay = 0.0 if image.quota == len(image) and not options.faithful else options.quantile
            weights = merge_weights(attention, tokens.tower_states[row, index], regions, anchors, reach, stay)
            groups.append(MergeGroup(row, index[anchors], index, weights))
        # (5) sums of the tower's features, through the projector
        scores = tokens.cls_attention.masked_fill(~tokens.exists, float("-inf"))
        merged = Merge.from_groups(tokens, groups, scores=scores)
        return projected(merged, tokens) if Projector() in stage.reads else merged

    def budget_ladders(self, shape: Shape) -> Iterable[Ladder]:
        """Published: 7/4 B and B/4, from L/2 on. Where the first would be above N, the second is larger."""
        total = shape.image_tokens
        published = [(number, max(1, number // 7)) for number in range(total, 0, -1)]
        given = [self.options.keep] if "keep" in self.options.model_fields_set else published
        yield [{"keep": numbers} for numbers in given]
