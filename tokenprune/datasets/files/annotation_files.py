"""Reading annotation files: text and JSON, with errors of one line that name the file and the place in it."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.arguments import shown, unicode_problem
from tokenprune.utils.files import reason

MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def text_of(path: Path, encodings: Sequence[str] = ("utf-8",)) -> str:
    """The text of a file, without a byte order mark; the first encoding that fits.

    Raises:
        InputError: it cannot be read, is no regular file (a pipe would never end), or none fits; names the line.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is no regular file, expected annotations; check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({reason(error)}); check the path") from error
    failed: UnicodeDecodeError | None = None
    for encoding in encodings:
        try:
            return data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
        except UnicodeDecodeError as error:
            failed = failed or error
    assert failed is not None
    mark = next((f", it is {name}" for mark, name in MARKS.items() if data.startswith(mark)), "")
    line = data.count(b"\n", 0, failed.start) + 1
    expected = " or ".join(encodings)
    raise InputError(f"{str(path)!r}, line {line}: no text in {expected}{mark}; save the file as UTF-8") from failed


def json_of(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Any:
    """The value of a JSON file. Raises InputError as `text_of`, or if it is not JSON."""
    return parsed(text_of(path, encodings), repr(str(path)))


def parsed(text: str, where: str, line: int = 1, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text whose first line is this one of `where`. Raises InputError if it is not JSON.

    `pairs` makes what stands for an object, by default a dict, from its (key, value).
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        found = f"{where}, line {line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno})"
        raise InputError(f"{found}; repair the line, or get the file again") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: not annotations ({why}); get the file again") from error


def words(value: Any, what: str) -> str:
    """A query as it is shown to a model: without spaces at its ends. Raises InputError unless it is text."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is {shown(value)}, expected words")
    if problem := unicode_problem(value):
        raise InputError(f"{what} {value[:60]!a} {problem}")
    return value.strip()


def item(record: Any, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """`record[key]`, of this type. Raises InputError for another type, text that is no Unicode, or if it is absent."""
    if not isinstance(record, dict):
        raise InputError(f"{what} is {shown(record)}, expected an object with {key!r}")
    if key not in record:
        raise InputError(f"{what} has no {key!r}; found {', '.join(map(repr, list(record)[:8])) or 'nothing'}")
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not {bool, object} & {*kinds}):
        names = " or ".join(NAMES.get(one, one.__name__) for one in kinds)
        raise InputError(f"{what} has {key!r} {shown(value)}, expected {names}")
    if isinstance(value, str) and (problem := unicode_problem(value)):
        raise InputError(f"{what} has {key!r} {value[:60]!a}, which {problem}")
    return value


def side(record: Any, key: str, what: str) -> int:
    """`record[key]`, a height or width in pixels; 31.0 is 31. Raises InputError for anything else."""
    value = item(record, key, object, what)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value < 1 or not float(value).is_integer():
        raise InputError(f"{what} has {key!r} {shown(value)}, expected a whole number of pixels; get the file again")
    return int(value)


NAMES = {list: "a list", dict: "an object", str: "text", int: "a whole number", bool: "true or false"}
