"""Errors of the database and of the disk, as one line that says what to do."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenprune.errors import InputError, TokenPruneError
from tokenprune.utils.files import reason

FILE = "results.sqlite"


@contextmanager
def told(home: Path) -> Iterator[None]:
    """Errors of the database and of the disk as one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            why = "the disk is full; make room, and give the same command: it goes on from what is stored"
        elif "decode" in str(error):
            raise _damaged(home, error) from error
        elif "locked" in str(error):
            why = "another process holds it; close that, and give the same command"
        elif "disk I/O" in str(error):
            why = "the disk failed or a quota is used up; see to it, and give the same command: it goes on"
        else:
            why = f"it cannot be used ({error}); check that the folder can be written"
        raise InputError(f"{str(home / FILE)!r}: {why}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(home, error) from error
    except OSError as error:
        raise InputError(f"{str(home)!r} cannot be written ({reason(error)}); choose another folder") from error


@contextmanager
def decoding(home: Path) -> Iterator[None]:
    """Values that cannot be decoded as one line: what the database holds is whole, but not what was stored."""
    try:
        yield
    except TokenPruneError:
        raise
    except (ValueError, TypeError, zlib.error) as error:
        raise _damaged(home, error) from error


def _damaged(home: Path, error: Exception) -> InputError:
    cure = f"keep a copy and try `sqlite3 {FILE} .recover`, or start a new folder"
    return InputError(f"{str(home / FILE)!r} is damaged ({' '.join(str(error).split())}); {cure}")
