"""Recognising and loading LISA checkpoints in their original format."""

from __future__ import annotations

from tokenprune_adapters.common.load_options import LoadOptions
from tokenprune_adapters.lisa.model import LisaModel
from tokenprune_adapters.segmentation.loading import Opened, SegmenterAdapter
from tokenprune_adapters.segmentation.sam.loading import sam_segmenter_parts

SAM_PREFIX = "model.visual_model."


class LisaAdapter(SegmenterAdapter):
    """LISA checkpoints (7B, 13B, or any size) in the format of their authors, on LLaMA, CLIP and SAM."""

    family = "LISA"
    prefix = SAM_PREFIX + "image_encoder."

    @classmethod
    def build(cls, opened: Opened[LoadOptions]) -> LisaModel:
        """The model of an opened checkpoint, with its projector: linear, or that of LLaVA-1.5."""
        tokenizer = opened.tokenizer(LisaModel.seg_tokens)
        parts = sam_segmenter_parts(opened, SAM_PREFIX)
        return LisaModel(tokenizer=tokenizer, **parts)
