"""The context length of decoders, checked because a longer prompt gives no error but meaningless output."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import InputError


def check_length(config: Any, positions: int) -> None:
    """Check that a prompt fits into the decoder's context.

    Args:
        config: configuration of the decoder.
        positions: number of positions of the longest prompt, image tokens included.

    Raises:
        InputError: it is longer.
    """
    limit = context_length(config)
    if limit is not None and positions > limit:
        raise InputError(
            f"the prompt has {positions} positions, image tokens included; the model's maximum is {limit} "
            "(max_position_embeddings of its config); shorten the prompt, or use fewer images"
        )


def context_length(config: Any) -> int | None:
    """The decoder's maximum number of positions, including RoPE scaling; None if its configuration has no limit."""
    known: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if known is None or any(part.get("rope_type", part.get("type")) == "dynamic" for part in parts):
        return None  # dynamic scaling supports any length
    factor = max(float(part.get("factor") or 1) for part in parts)
    original = max(int(part.get("original_max_position_embeddings") or 0) for part in parts)
    return max(known, int((original or known) * factor))  # configs differ in whether `known` is already scaled
