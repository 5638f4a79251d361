"""LISA on transformers' own classes: from an image and queries to masks."""

from __future__ import annotations

from typing import Any

from tokenprune_adapters.lisa.prompts import FORCED_ANSWER, SEG_TOKEN, forced_prompt, open_prompt
from tokenprune_adapters.sam_segmenter import SamSegmenter


class LisaModel(SamSegmenter):
    """A loaded LISA; see `SamSegmenter` for its parts and `segment` for what it does. Every query is a batch row."""

    seg_tokens = (SEG_TOKEN,)
    forced_answer = FORCED_ANSWER

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        (self.seg_id,) = super().seg_ids

    @property
    def seg_ids(self) -> list[int]:
        """The id of [SEG]."""
        return [self.seg_id]

    def ask(self, queries: list[str], sentences: list[bool], answer: str) -> list[str]:
        """One prompt for each query, in LISA's templates."""
        template = forced_prompt if answer == "forced" else open_prompt
        return [template(text, flag, self.mark_image) for text, flag in zip(queries, sentences, strict=True)]
