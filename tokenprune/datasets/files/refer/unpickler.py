"""Reads pickles that hold data alone: lists, tuples, dicts, sets, texts, bytes, numbers, bool and None.

A pickle can name any function of any module and call it, so one from elsewhere may do anything. This reader looks up
no name except the few that Python's own pickles of bytes and sets contain; every other one is refused. Numbers of numpy
are refused as well: the files of REFER have none, since the readers in use, which decode texts as ASCII, would fail on
them.
"""

from __future__ import annotations

import codecs
import io
import os
import pickle
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.files import absent, reason

LARGEST = 2**30  # bytes; the files of REFER have less than a tenth
_TEXTS = "tokenprune.utf8-or-latin1"


def read_pickle(path: Path) -> Any:
    """The data of a pickle of any protocol.

    Texts of Python 2, which are bytes, are decoded as UTF-8, and bytes that are not as Latin-1.

    Raises:
        InputError: no such file, one that is damaged, truncated or larger than 1 GiB, or that names anything that is
            not data.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is no regular file, expected a pickle; check the path")
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST else b""
    except FileNotFoundError:
        raise InputError(absent(path)) from None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({reason(error)}); check its permissions") from error
    if size > LARGEST:
        raise InputError(f"{str(path)!r} has {size} bytes, more than any file of referring expressions; check the path")
    try:
        return _Reader(io.BytesIO(content), encoding="utf-8", errors=_TEXTS).load()
    except _Named as error:
        raise InputError(
            f"{str(path)!r} is a pickle that names {error.args[0]!r}, which is not data and may run code; expected "
            "lists, dicts, texts and numbers; use the file that the dataset's authors published"
        ) from None
    except Exception as error:  # what a damaged pickle raises may be anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{str(path)!r} cannot be read as a pickle ({why}); give an intact file") from error


class _Named(Exception):
    """A global that is not data."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _DATA[module, name]
        except KeyError:
            raise _Named(f"{module}.{name}"[:80]) from None


class _Encode:
    """`codecs.encode`, with which pickles of the protocols 0 to 2 make bytes."""

    __slots__ = ()  # or a pickle could change it

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise pickle.UnpicklingError("bytes of an unknown encoding")
        return text.encode("latin-1")


class _Empty:
    """`bytes`, with which they make bytes of length 0; with a number it would take that much memory."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


_BUILTINS = ("builtins", "__builtin__")  # of Python 3 and 2
_DATA: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _Encode(),
    **{(module, "bytes"): _Empty() for module in _BUILTINS},
    **{(module, "set"): set for module in _BUILTINS},
    **{(module, "frozenset"): frozenset for module in _BUILTINS},
}


def _as_latin1(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(_TEXTS, _as_latin1)
