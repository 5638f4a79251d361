"""`tokenprune merge`: the shards of a sweep as one store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cli.arguments import path


def command(
    shards: Annotated[list[Path], typer.Argument(parser=path, help="Folders of the shards.")],
    out: Annotated[Path, typer.Option(parser=path, help="Folder of the result.")],
) -> None:
    """Merge the shards of a sweep (`tokenprune sweep --shard 1/4`) into one store."""
    from tokenprune.cli.commands.sweep import show
    from tokenprune.sweeps.merge import merge

    show(merge(shards, out), out)
