"""CDPruner (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", https://arxiv.org/abs/2506.10967)."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune import Decision, Keep, Shape, Stage, Strategy, StrategyOptions, Tokens
from tokenprune.core.options import COMPACT, KEPT, WORDING, Amount, Wording, tokens_of
from tokenprune.core.reads import ClipImageEmbeddings, ClipTextEmbeddings, Crops, HiddenStates
from tokenprune.core.stage import Positions
from tokenprune_strategies.ops.dpp import map_picks
from tokenprune_strategies.ops.stacked_images import StackedImages, halves


class CDPruner(Strategy):
    """Keep the image tokens that are most diverse, given the question, before the first decoder layer.

    A determinantal point process (section 3) whose kernel is the similarity of image tokens, weighted by relevance on
    both sides. Tokens *less* similar to the text weigh more, as in the authors' code.

    Ours: batch rows are independent; if the kernel's rank is exhausted, the other tokens are picked by relevance (the
    authors' code then repeats tokens, and so keeps fewer).
    """

    name = "cdpruner"
    budget_option = "keep"

    class Options(StrategyOptions):
        """Options of CDPruner."""

        keep: Amount = Field(0.112, description=KEPT)
        wording: Wording = Field("question", description=WORDING)
        split: bool = Field(
            False, description="choose half of the tokens in each half of the image, as OpenVINO GenAI does by default"
        )
        positions: Positions = Field("renumber", description=COMPACT)

    options: Options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """One stage before the first layer."""
        text = ClipTextEmbeddings(self.options.wording, "segments")
        reads = (HiddenStates(), ClipImageEmbeddings(), text, *shape.offered(Crops()))
        yield Stage("select", 0, tokens_of(self.options.keep, shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Pick tokens of each crop, all crops of the batch at once."""
        texts, exists = tokens.clip_text_embeddings
        # (1) relevance q, scaled over the whole row: crops of an image are scaled together, but pruned separately
        values = dissimilarity(tokens.clip_image_embeddings, texts, exists)
        scores = scaled(values, tokens.active)
        crops = StackedImages.of(tokens, halves(tokens.images()) if self.options.split else None)
        weights = scaled(crops.take(values), crops.exists) if self.options.split else crops.take(scores)
        # (2) diversity S, the cosine similarity of tokens as they enter the decoder; (3) greedy MAP inference of the
        # process with the kernel q_i S_ij q_j
        picks = map_picks(crops.take(tokens.hidden), weights, crops.exists, crops.quotas)
        return Keep.where(crops.mask(picks, tokens), scores=scores.masked_fill(~tokens.active, float("-inf")))


def dissimilarity(images: Tensor, texts: Tensor, exists: Tensor) -> Tensor:
    """float32 [batch, N]: how little each image token is like the texts, on average over them.

    Args:
        images: float32 [batch, N, P].
        texts: float32 [batch, M, P], the segments of the question.
        exists: bool [batch, M], which texts exist.
    """
    likeness = normalize(images, dim=-1) @ normalize(texts, dim=-1).transpose(1, 2)
    return -(likeness * exists[:, None]).sum(2) / exists.sum(1, keepdim=True)


def scaled(values: Tensor, active: Tensor) -> Tensor:
    """Values float [rows, n] scaled to 0 … 1 among those that bool `active` marks; 0 elsewhere."""
    low = values.masked_fill(~active, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~active, float("-inf")).amax(1, keepdim=True)
    # 1e-6 as in the authors' code, to keep every relevance above 0; the clamp, for equal values, is ours
    return ((values - low + 1e-6) / (high - low).clamp(min=1e-6)).masked_fill(~active, 0)
