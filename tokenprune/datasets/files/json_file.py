"""Reads annotation files of JSON; errors are one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.files import absent, reason


def read_json(path: Path) -> Any:
    """The value in a file. Raises InputError if it is missing, cannot be read, or is not JSON in UTF-8."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(absent(path)) from None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({reason(error)}); check its permissions") from error
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: not JSON, or not UTF-8
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise InputError(f"{str(path)!r} cannot be read as JSON ({why}); give an intact file") from error
