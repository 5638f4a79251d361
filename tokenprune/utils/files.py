"""Writing files: each is whole or not there at all.

Everything is written under a temporary name in the folder that it belongs to, and given its own name at the end.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenprune.errors import InputError


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` for home folders, as shells have it; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def absent(path: str | Path) -> str:
    """What is told of a file that is not there, as it follows what it should be: its path, what is wrong, the cure."""
    if is_url(path):
        shown = re.sub(":/+", "://", str(path), count=1)  # a Path has one slash only
        return f"{shown!r} is a URL, which is not fetched; download it, and give the file"
    return f"{str(path)!r}: no such file; check the path"


def is_url(path: str | Path) -> bool:
    """Whether what should be a path is an address on the web or the like."""
    return re.match(r"(https?|ftp|s3|gs|hf):/", str(path)) is not None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, which becomes `path` at the end; after an error `path` is what it was before.

    A link is followed, and the permissions of a file that is replaced stay.

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
    """Write a text file of a name that must be free; False, and nothing is written, where it is taken.

    Of several processes that write one name at the same time, one is given True.

    Raises:
        InputError: it cannot be written.
    """
    with _writing(path, path) as (temporary, target):
        temporary.write_text(text, encoding="utf-8")
        _to_disk(temporary)
        try:
            os.link(temporary, target)  # unlike a rename, it never takes the place of another file
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if target.exists():
                return False
            os.replace(temporary, target)
    return True


@contextmanager
def new_folder(path: Path, cure: str) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end; after an error nothing of it stays.

    Args:
        path: of the folder, which is not there yet.
        cure: what to do where it cannot be written, for the message.

    Raises:
        InputError: it cannot be written, or there is a folder of that name by now.
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
    """What the system says is wrong."""
    return error.strerror or type(error).__name__


def _to_disk(path: Path) -> None:
    """Wait until a file is stored: where space runs out late (quotas, network file systems), this says it."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
