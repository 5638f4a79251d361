"""PixelLM's codebook of mask tokens, and its answers."""

from __future__ import annotations

from tokenprune_adapters import queries
from tokenprune_adapters.queries import open_prompt

__all__ = ["FORCED_ANSWER", "SEG_TOKENS", "forced_prompt", "open_prompt"]

SEG_TOKENS = tuple(f"[SEG{number}]" for number in range(6))
"""The six tokens of one mask, scale by scale: the first three for the coarser masks, the others for the finer ones."""
FORCED_ANSWER = f"{' '.join(SEG_TOKENS)}."


def forced_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt of evaluation with the answer that holds the codebook; arguments as in `queries.forced_prompt`."""
    return queries.forced_prompt(query, sentence, mark_image, FORCED_ANSWER)
