"""An observer for tokenprune that writes every decision to a file of JSON lines."""

from __future__ import annotations

__version__ = "0.1.0"
