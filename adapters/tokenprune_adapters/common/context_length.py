"""How long a prompt may be: what lies beyond the positions that a decoder was made for gives no error, but nonsense."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import InputError


def check_length(config: Any, positions: int) -> None:
    """See that a prompt is no longer than the decoder's context.

    Args:
        config: of the decoder.
        positions: that the longest prompt takes, image tokens included.

    Raises:
        InputError: it is longer.
    """
    limit = context_length(config)
    if limit is not None and positions > limit:
        raise InputError(
            f"the prompt takes {positions} positions, image tokens included; the model was made for {limit} "
            "(max_position_embeddings of its config); shorten the words, or ask about fewer images at once"
        )


def context_length(config: Any) -> int | None:
    """The positions that a decoder was made for, stretched as its config says; None where that names no limit."""
    known: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if known is None or any(part.get("rope_type", part.get("type")) == "dynamic" for part in parts):
        return None  # dynamic scaling stretches to any length
    factor = max(float(part.get("factor") or 1) for part in parts)
    original = max(int(part.get("original_max_position_embeddings") or 0) for part in parts)
    return max(known, int((original or known) * factor))  # whether a config's own number is stretched already differs
