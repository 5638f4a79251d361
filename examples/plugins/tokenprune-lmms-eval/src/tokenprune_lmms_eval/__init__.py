"""Models of lmms-eval whose answers are generated under a pruning strategy, and their results as a table."""

from __future__ import annotations

__version__ = "0.1.0"
