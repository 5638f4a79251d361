"""PixelLM (Ren et al., arXiv 2312.02228): reasoning segmentation with a LLaMA decoder, a CLIP tower and a codebook."""

from __future__ import annotations

from tokenprune.utils.mask_matching import match_masks
from tokenprune_adapters.pixellm.adapter import PixelLMAdapter
from tokenprune_adapters.pixellm.model import PixelLMModel
from tokenprune_adapters.pixellm.scores import mask_scores
from tokenprune_adapters.segmentation.data import Segmentation

__all__ = ["PixelLMAdapter", "PixelLMModel", "Segmentation", "mask_scores", "match_masks"]
