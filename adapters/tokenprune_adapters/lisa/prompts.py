"""LISA's question templates with its own answer."""

from __future__ import annotations

from tokenprune_adapters import queries
from tokenprune_adapters.queries import PHRASE, SENTENCE, is_sentence, open_prompt

__all__ = ["FORCED_ANSWER", "PHRASE", "SEG_TOKEN", "SENTENCE", "forced_prompt", "is_sentence", "open_prompt"]

SEG_TOKEN = "[SEG]"
FORCED_ANSWER = "[SEG]."


def forced_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt of LISA's evaluation, with the answer that holds [SEG]; arguments as in `queries.forced_prompt`."""
    return queries.forced_prompt(query, sentence, mark_image, FORCED_ANSWER)
