"""What was read of large annotation files, kept on disk, so that the next run reads only what it needs.

An index is a set of named parts, such as one for each split, which are plain JSON values. Its file begins with a line
of JSON that says what it was made from and where each part is; a part has a checksum. An index of other files, or a
damaged one, is made anew; one that cannot be written is made anew each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.files import absent, expanded, reason, replacing

VARIABLE = "TOKENPRUNE_CACHE"
FORMAT = 1  # of the file itself


class Index:
    """The parts of what `build` makes from some files; built at the first use, unless it is on disk.

    Args:
        kind: what the parts are, with a version that changes whenever `build` gives something else: "refer-1".
        files: what `build` reads. The index is made anew if a path, size or time of modification differs.
        build: gives the parts by name; values of JSON, since the next run reads them as such.

    Raises:
        InputError: one of the files is missing.
    """

    def __init__(self, kind: str, files: Sequence[Path], build: Callable[[], Mapping[str, Any]]) -> None:
        self._made_from = [kind, FORMAT, *(_state(file) for file in files)]
        self._build = build
        self._built: dict[str, str] | None = None
        folder = cache_folder()
        name = hashlib.sha256(json.dumps([kind, *(os.path.abspath(file) for file in files)]).encode()).hexdigest()
        self._file = None if folder is None else folder / "index" / f"{name[:40]}.jsonl"

    def part(self, name: str) -> Any:
        """A part, a new object each time. Raises what `build` raises, and KeyError if there is no part of this name."""
        if self._built is None:
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # none, of other files, damaged
                return json.loads(self._stored(name))
            self._built = {part: json.dumps(value) for part, value in self._build().items()}
            with suppress(OSError, InputError):  # no room, no permission, no folder
                self._store(self._built)
        return json.loads(self._built[name])

    def _stored(self, name: str) -> bytes:
        if self._file is None:
            raise LookupError(name)
        with self._file.open("rb") as stored:
            head = json.loads(stored.readline())
            if head["made_from"] != self._made_from:
                raise ValueError("made from other files")
            place, length, checksum = head["parts"][name]
            stored.seek(place, os.SEEK_CUR)
            text = stored.read(length)
        if hashlib.sha256(text).hexdigest() != checksum:
            raise ValueError("damaged")
        return text

    def _store(self, parts: Mapping[str, str]) -> None:
        if self._file is None:
            return
        place, places, lines = 0, {}, []
        for name, text in parts.items():
            line = text.encode() + b"\n"
            places[name] = [place, len(line), hashlib.sha256(line).hexdigest()]
            place += len(line)
            lines.append(line)
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(self._file) as temporary:
            head = json.dumps({"made_from": self._made_from, "parts": places}).encode() + b"\n"
            temporary.write_bytes(b"".join([head, *lines]))


def cache_folder() -> Path | None:
    """$TOKENPRUNE_CACHE, else `tokenprune` in $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # any other is ignored, by the XDG specification
        return Path(base) / "tokenprune"
    try:
        return Path.home() / ".cache" / "tokenprune"
    except RuntimeError:
        return None


def _state(file: Path) -> list[Any]:
    try:
        found = file.stat()
    except FileNotFoundError:
        raise InputError(absent(file)) from None
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({reason(error)}); check its permissions") from error
    return [os.path.abspath(file), found.st_size, found.st_mtime_ns]
