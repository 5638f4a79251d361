"""Checkpoints that are shipped inside the package."""

from __future__ import annotations

from pathlib import Path


def lisa_tiny() -> Path:
    """Folder of the `lisa-tiny` checkpoint."""
    return Path(__file__).parent / "lisa_tiny"
