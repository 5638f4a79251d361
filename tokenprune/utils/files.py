"""Writing files atomically: under a temporary name in the target's folder, renamed at the end."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown, unicode_problem

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Suffixes of images in folders; files that are given by name are tried with any suffix."""


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` expanded as in shells; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def path_given(name: str, value: object) -> Path:
    """An argument that is a path, with `~` expanded.

    Raises:
        InputError: something else, an empty text, or a name that no file can have.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise InputError(f"{name}={shown(value)} found, expected the path of a file or folder")
    problem = "holds a null character, which no path has" if "\0" in str(value) else unicode_problem(str(value))
    if problem:
        raise InputError(f"{name} {str(value)[:60]!a} {problem}")
    return expanded(value)


def absent(path: str | Path) -> str:
    """The message about a missing file, after the word for what it is: its path, what is wrong, what to do."""
    if is_url(path):
        shown = re.sub(":/+", "://", str(path), count=1)  # a Path merges slashes
        return f"{shown!r} is a URL, which is not fetched; download it, and give the file"
    return f"{str(path)!r}: no such file; check the path"


def is_url(path: str | Path) -> bool:
    """Whether a path is really a URL."""
    return re.match(r"(https?|ftp|s3|gs|hf):/", str(path)) is not None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes `path` at the end; after an error `path` is unchanged.

    Links are followed, and the permissions of a replaced file are kept.

    Raises:
        InputError: it cannot be written.
    """
    with _writing(Path(os.path.realpath(expanded(path))), path) as (temporary, target):
        yield temporary
        _to_disk(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)


def write_first(path: Path, text: str) -> bool:
    """Write a new text file; returns False, and writes nothing, if the file exists.

    Of several processes that write the same file at the same time, one gets True.

    Raises:
        InputError: it cannot be written.
    """
    with _writing(path, path) as (temporary, target):
        temporary.write_text(text, encoding="utf-8")
        _to_disk(temporary)
        try:
            os.link(temporary, target)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if target.exists():
                return False
            os.replace(temporary, target)
    return True


@contextmanager
def new_folder(path: Path, cure: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end; after an error it is removed.

    Args:
        path: of the new folder.
        cure: what to do if it cannot be written, for the message.

    Raises:
        InputError: it cannot be written, or the folder exists by now.
    """
    with _writing(path, path, cure) as (temporary, target):
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, target)


@contextmanager
def _writing(target: Path, shown: str | Path, cure: str = "choose another place") -> Iterator[tuple[Path, Path]]:
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary, target
    except OSError as error:
        raise InputError(f"{str(shown)!r} cannot be written ({reason(error)}); {cure}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()


def reason(error: OSError) -> str:
    """The system's message."""
    return error.strerror or type(error).__name__


def _to_disk(path: Path) -> None:
    """Wait until a file is stored: reports late errors (quotas, network file systems)."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
