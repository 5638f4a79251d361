"""What to do where an optional package is missing."""

from __future__ import annotations


def install_extra(name: str) -> str:
    """The end of a message about a package that is not installed: which extra of pyproject.toml brings it."""
    return f'install the extra: pip install "tokenprune-vlm[{name}]"'
