"""`tokenprune report`: a sweep as one HTML file, with tables and figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tokenprune.cli.arguments import path
from tokenprune.cli.printing import note


# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
def command(
    run: Annotated[Path, typer.Argument(parser=path, help="Folder of the sweep.")],
    out: Annotated[Path, typer.Option(parser=path, help="The HTML file; an existing one is replaced.")],
    tables: Annotated[
        Optional[Path], typer.Option(parser=path, help="Folder for the numbers as LaTeX, CSV and Markdown.")
    ] = None,
    figures: Annotated[
        Optional[Path], typer.Option(parser=path, help="Folder for figures of papers as PNG, SVG and PDF.")
    ] = None,
) -> None:
    """Write the report of a sweep: plots, paired differences, a table and a gallery in one HTML file.

    The file needs no other file and no network. It can be made while the sweep runs.
    """
    from tokenprune.report.page.write import write_report

    written = write_report(run, out, tables, figures)
    note(f"wrote {written[0]}, {written[0].stat().st_size / 1e6:.1f} MB")
    for folder in (tables, figures):
        if folder is not None:
            count = sum(one.parent == folder.expanduser() for one in written[1:])
            note(f"wrote {count} files in {folder}")
