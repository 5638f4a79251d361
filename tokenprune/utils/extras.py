"""What to do where an optional package is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from tokenprune.errors import UnsupportedError


def install_extra(name: str) -> str:
    """The end of a message about a package that is not installed: which extra of pyproject.toml brings it."""
    return f'install the extra: pip install "tokenprune-vlm[{name}]"'


def check_modules(what: str, modules: Iterable[str], extra: str) -> None:
    """Check before any work that optional packages are installed; nothing is imported.

    Args:
        what: what needs them, such as "a report".
        modules: their import names.
        extra: the extra of pyproject.toml that brings them.

    Raises:
        UnsupportedError: a package is missing.
    """
    missing = [name.replace("_", "-") for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UnsupportedError(
            f"{what} is made with {', '.join(missing)}, which {are} not installed; {install_extra(extra)}"
        )
