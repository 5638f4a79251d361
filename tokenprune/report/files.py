"""Writing single pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError


def check_target(path: Path) -> None:
    """See before any work that a PNG can be written there.

    Raises:
        InputError: another suffix, a folder, or a place that cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"output {str(path)!r}: found suffix {path.suffix!r}, expected .png")
    parent = path.expanduser().parent
    if path.is_dir() or not parent.is_dir():
        found = "a folder of that name" if path.is_dir() else f"no folder {str(parent)!r}"
        raise InputError(f"output {str(path)!r}: found {found}; choose another path or make the folder")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise InputError(f"output {str(path)!r} cannot be written (permission denied); choose another path")


def write_mask(mask: Any, path: Path) -> None:
    """A bool mask [H, W] as PNG with one 8-bit channel: 255 inside, 0 outside."""
    from PIL import Image

    Image.fromarray(mask.astype("uint8") * 255).save(path, format="PNG")
