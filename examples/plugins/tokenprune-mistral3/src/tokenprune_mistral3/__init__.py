"""The adapter `mistral3` for tokenprune."""

from __future__ import annotations

__version__ = "0.1.0"
