"""CSP: cluster, scatter, prune (Chen et al., "LVLM_CSP: Accelerating Large Vision Language Models via Clustering,
Scattering, and Pruning for Reasoning Segmentation", https://arxiv.org/abs/2504.10854)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_serializer
from torch import Tensor

from tokenprune import Decision, Keep, Restore, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.budget import check_counted, too_small
from tokenprune.core.options import POSITIONS, QUERY, QUERY_REDUCE, Amount, Depth, QueryReduce, tokens_of
from tokenprune.core.reads import AttentionFrom, Embeddings, HiddenStates
from tokenprune.core.stage import Positions
from tokenprune.errors import OptionError
from tokenprune_strategies.csp.clustering import Clustering, cluster, nearest_representative, reads_of
from tokenprune_strategies.csp.fill import fill

REPRESENTATIVES, KEEP = 0.25, 0.0625


class CSP(Strategy):
    """Coarse reasoning over N_c representative tokens, fine reasoning over all N, then only the N_p most attended ones.

    Training-free. Ours: boundaries and sizes, as fractions of depth and N; the clusterings `grid` and `kmeans`; the
    re-entry rule `delta`; that positions are kept unless told otherwise.
    """

    name = "csp"
    shares = (REPRESENTATIVES, KEEP)  # N_c and N_p of N, in whose proportion a budget is spent

    class Options(StrategyOptions):
        """Options of CSP."""

        clustering: Clustering | None = Field(
            "grid",
            description="how representatives are chosen, see `clustering`; none = cls_attention, or grid if the tower "
            "has no [CLS]",
        )
        representatives: Amount = Field(REPRESENTATIVES, description="N_c, number (int) or share (float) of tokens")
        keep: Amount = Field(KEEP, description="N_p, number (int) or share (float) of tokens")
        scatter_at: Depth = Field(0.25, description="s, layer (int) or share of the depth (float)")
        prune_at: Depth | None = Field(
            0.5, description="p, layer (int) or share of the depth (float); none = s + 1, one layer with all tokens"
        )
        reentry: Literal["projected", "delta"] = Field(
            "projected",
            description="state of restored tokens: projected (as parked) or delta (plus the change of the "
            "representative's state)",
        )
        query: str = Field("mask_query", description=QUERY)
        query_reduce: QueryReduce = Field("mean", description=QUERY_REDUCE)
        positions: Positions = Field("keep", description=POSITIONS)
        seed: int = Field(0, description="random seed of random and kmeans clustering, and of regions")
        segmenter: str | Callable[[Any], Any] | None = Field(
            None,
            description="for seg_first: an installed segmenter, an image-segmentation checkpoint, or a function from "
            "uint8 [H, W, 3] to bool [n, H, W]",
        )
        regions: int = Field(
            8, ge=1, description="for seg_first without a segmenter: regions of tower features per image"
        )
        faithful: bool = Field(
            False,
            description="cls_attention and seg_first as reviews give the paper's formulas: one softmax at full width; "
            "max(1, ⌊N_c · share of the area⌋) tokens of each instance, so that their number varies",
        )

        @field_serializer("segmenter")
        def _segmenter_name(self, segmenter: str | Callable[[Any], Any] | None) -> str | None:
            return segmenter if segmenter is None or isinstance(segmenter, str) else getattr(segmenter, "__name__", "?")

    options: Options

    def without_effect(self) -> Mapping[str, str]:
        """See `Strategy.without_effect`."""
        kind, found = self.options.clustering, dict[str, str]()
        segments = kind == "seg_first"
        regions = segments and self.options.segmenter is None
        if not segments:
            found["segmenter"] = f"with clustering={kind}, only with seg_first"
        if not regions:
            found["regions"] = "except with clustering=seg_first and without a segmenter"
        if not regions and kind not in ("random", "kmeans"):
            found["seed"] = f"with clustering={kind}, which is not random"
        if kind not in (None, "cls_attention", "seg_first"):
            found["faithful"] = f"with clustering={kind}, only with cls_attention and seg_first"
        return found

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Cluster at layer 0, scatter at s, prune at p. Raises OptionError if the model is not deep enough."""
        scatter_at, prune_at = self.boundaries(shape.layers)
        total = shape.image_tokens
        states = (HiddenStates(), Embeddings()) if self.options.reentry == "delta" else ()
        varies = self.options.faithful and self.options.clustering == "seg_first"
        few = None if varies else tokens_of(self.options.representatives, total)
        yield Stage("cluster", 0, few, reads_of(self.options, shape))
        yield Stage("scatter", scatter_at, total, states)
        attention = AttentionFrom(self.options.query, self.options.query_reduce)
        yield Stage("prune", prune_at, tokens_of(self.options.keep, total), (attention,))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Park all but the representatives; restore them; keep the most attended."""
        if stage.name == "cluster":  # coarse reasoning: layers [0, s)
            clusters = cluster(self.options, tokens, stage.reads)
            tokens.memory["clusters"] = clusters
            return Keep.where(clusters.representatives, rest="park")
        if stage.name == "scatter":  # fine reasoning: layers [s, p)
            return Restore.where(tokens.parked, values=self.moved(tokens) if self.options.reentry == "delta" else None)
        # layers [p, L): the N_p most attended in layer p−1, softmax over all keys, mean over heads (ours)
        return Keep.top(tokens.attention, tokens.target)

    def moved(self, tokens: Tokens) -> Tensor:
        """[batch, N, width]: every token's state plus the change of its representative's state so far (ours)."""
        representative = nearest_representative(tokens, tokens.memory["clusters"])
        gained = tokens.hidden - tokens.embeddings
        # a parked token's state is still its embedding, so its own change is 0
        states: Tensor = tokens.hidden + gained.gather(1, representative[..., None].expand_as(gained))
        return states

    def boundaries(self, layers: int) -> tuple[int, int]:
        """(s, p): fractions rounded to the nearest layer, at least one layer for each of the three stages.

        Raises:
            OptionError: fewer than 3 layers, or explicit layers that are not 0 < s < p < L.
        """
        first, second = self.options.scatter_at, self.options.prune_at
        last = second if isinstance(second, int) else layers - 1
        prune_at = min(max(int(second * layers + 0.5), 2), last) if isinstance(second, float) else last
        scatter_at = first if isinstance(first, int) else min(max(int(first * layers + 0.5), 1), prune_at - 1)
        prune_at = scatter_at + 1 if second is None else prune_at
        if not 0 < scatter_at < prune_at < layers:
            raise OptionError(
                f"strategy {self.name!r}: options 'scatter_at', 'prune_at': {first} and {second} give layers "
                f"{scatter_at} and {prune_at}, expected 0 < scatter_at < prune_at < {layers}, the model's layers"
            )
        return scatter_at, prune_at

    def solve_budget(self, budget: float, shape: Shape) -> dict[str, Any]:
        """Options that use the budget, see `csp.fill`; the user's options are not changed. Raises BudgetError."""
        given, total = self.options.model_fields_set, shape.image_tokens
        check_counted(self, budget, shape)
        scatter_at, prune_at = self.boundaries(shape.layers)
        later = [(s, prune_at) for s in range(scatter_at, prune_at)]
        sooner = [(scatter_at, p) for p in range(prune_at, scatter_at, -1)]
        windows = later if "scatter_at" not in given else sooner if "prune_at" not in given else later[:1]
        few, kept = self.options.representatives, self.options.keep
        fixed = (
            tokens_of(few, total) if "representatives" in given else None,
            tokens_of(kept, total) if "keep" in given else None,
        )
        found = fill(budget, shape, windows, fixed, self.shares)
        if isinstance(found, float):
            raise too_small(self, budget, shape, found)
        return found._asdict()
