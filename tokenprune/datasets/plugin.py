"""Registers the built-in datasets; imports none of them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl


@hookimpl
def tokenprune_register_datasets(register: Register) -> None:
    """Datasets that need no files."""
    register(
        "shapes", "tokenprune.datasets.shapes:Shapes", summary="procedural scenes of shapes, queries of four kinds"
    )
