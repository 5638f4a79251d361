"""LISA on transformers' own classes: from an image and queries to masks."""

from __future__ import annotations

from tokenprune_adapters.segmentation.sam.segmenter import SamSegmenter


class LisaModel(SamSegmenter):
    """A loaded LISA; see `SamSegmenter` for its parts and `segment` for what it does. Every query is a batch row.

    Its prompts are those of `tokenprune_adapters.segmentation.prompts`, since LISA introduced them.
    """
