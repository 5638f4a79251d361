"""Writes single pictures, and checks where they go."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError, UnsupportedError
from tokenprune.utils.extras import install_extra
from tokenprune.utils.files import expanded, replacing


def check_drawing(what: str) -> None:
    """Check before any work that plots and overlays can be drawn; nothing is imported.

    Args:
        what: requires them, for the message ("--overlay").

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(f"{what} draws with matplotlib, which is not installed; {install_extra('report')}")


def check_targets(targets: Mapping[str, Path], inputs: Sequence[Path] = ()) -> None:
    """Check before any work that pictures can be written.

    Args:
        targets: by option.
        inputs: files that are read, and must not be overwritten.

    Raises:
        InputError: see `check_target` and `check_distinct`.
    """
    for path in targets.values():
        check_target(path)
    check_distinct({option: [path] for option, path in targets.items()}, inputs)


def check_distinct(
    targets: Mapping[str, Sequence[Path]], inputs: Sequence[Path] = (), read: str = "the image that is read"
) -> None:
    """Check that no file is written twice, or also read; arguments as in `check_targets`, and `read`, the inputs' name.

    Raises:
        InputError: two of them are the same file.
    """
    seen = {_identity(path): read for path in inputs}
    for option, paths in targets.items():
        for path in paths:
            identity = _identity(path)
            if identity in seen:
                raise InputError(f"{option} {str(path)!r} is the same file as {seen[identity]}; choose another path")
            seen[identity] = option if len(paths) == 1 else f"{option} {str(path)!r}"


def check_target(path: Path) -> None:
    """Check before any work that a PNG can be written there.

    Raises:
        InputError: another suffix, a folder or something else that is not a file, or a place that cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"output {str(path)!r}: found suffix {path.suffix!r}, expected .png")
    check_place(path)


def check_place(path: Path) -> None:
    """Check before any work that a file can be written there.

    Raises:
        InputError: a folder or something else that is not a file, or a place that cannot be written.
    """
    target = Path(os.path.realpath(expanded(path)))  # follow links, as in writing
    if target.is_dir() or not target.parent.is_dir():
        found = "a folder of that name" if target.is_dir() else f"no folder {str(path.parent)!r}"
        raise InputError(f"output {str(path)!r}: found {found}; choose another path or make the folder")
    if target.exists() and not target.is_file():
        raise InputError(f"output {str(path)!r} is not a regular file; choose another path")
    if not all(os.access(place, os.W_OK) for place in (target, target.parent) if place.exists()):
        raise InputError(f"output {str(path)!r} cannot be written (permission denied); choose another path")


def write_mask(mask: Any, path: Path) -> None:
    """A bool mask [H, W] as PNG with one 8-bit channel: 255 inside, 0 outside.

    Raises:
        InputError: it cannot be written; an existing file is unchanged.
    """
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(mask.astype("uint8") * 255).save(temporary, format="PNG")


def _identity(path: Path) -> object:
    """Equal for two paths of one file, also with links, and with case-insensitive file systems."""
    found = expanded(path)
    try:
        known = found.stat()
    except OSError:  # does not exist yet
        return os.path.normcase(os.path.realpath(found))
    return (known.st_dev, known.st_ino)
