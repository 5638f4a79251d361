"""Rows of types whose pictures become squares: the whole picture, tiles of it, or words of a visual vocabulary."""

from __future__ import annotations

from vlm_tiny_processor import TinyProcessor

ROWS: dict[str, TinyProcessor] = {}
"""By `model_type`."""
