"""The adapter `voxtral` for tokenprune."""

from __future__ import annotations

__version__ = "0.1.0"
