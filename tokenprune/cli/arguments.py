"""Command-line options that several commands share, as Typer annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def path(text: str | Path) -> Path:
    """A path on the command line; refuses an empty text (an unset variable in a script)."""
    if not str(text):
        raise typer.BadParameter("an empty path found, expected that of a file or folder")
    return Path(text)


# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
ModelName = Annotated[str, typer.Option(help="Bundled model, checkpoint folder, or hub id.")]
Images = Annotated[
    list[Path],
    typer.Argument(
        parser=path,
        help='Image files, folders of images, patterns as "*.jpg".',
        metavar="IMAGE...",
        default_factory=list,  # a single argument is then the image, and the missing query is reported
        show_default=False,
    ),
]
StrategyName = Annotated[str, typer.Option(help="Name of a strategy; options after a colon, as in csp:query=seg.")]
OptionTexts = Annotated[
    Optional[list[str]],
    typer.Option("-o", "--option", metavar="KEY=VALUE", help="Option of the strategy; may be repeated."),
]
Budget = Annotated[Optional[float], typer.Option(help="Equivalent image tokens as a share of all, in (0, 1].")]
VisionTower = Annotated[
    Optional[Path], typer.Option(parser=path, help="The model's vision tower, where the checkpoint does not hold it.")
]
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, …")]
Threads = Annotated[
    Optional[int],
    typer.Option(help="Processor threads; by default OMP_NUM_THREADS, else what a short probe finds faster."),
]
