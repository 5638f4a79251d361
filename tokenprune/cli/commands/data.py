"""`tokenprune data check` and `data show`: whether a dataset's files are complete, and what its queries ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tokenprune.cli.arguments import path
from tokenprune.cli.commands.listing import Format
from tokenprune.cli.printing import NARROW_PIPE, progress, say_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenprune.datasets.base import Dataset
    from tokenprune.datasets.inspection import Inspection

app = typer.Typer(no_args_is_help=True, help="Check a dataset's files, and look at its queries.")

SHOWN = 20  # problems of a split below the table; JSON has all

# ruff: noqa: UP045 - Typer reads annotations at run time, on Python 3.10 too: hence Optional
DatasetName = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="Name; name:PATH with options as in coco:FILE,images=FOLDER; or module:Class."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the dataset.")]


@app.command("check")
def check(
    dataset: DatasetName,
    split: Annotated[Optional[str], typer.Option(help="Split to check.", show_default="all")] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(help="Queries of each split.", show_default="all; 200 if not read from files"),
    ] = None,
    seed: Seed = 0,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
) -> None:
    """Open every image and draw every target of a dataset. The exit code is 1 if something is missing or damaged."""
    from tokenprune.datasets.inspection import inspected
    from tokenprune.datasets.validation import check_request
    from tokenprune.errors import InputError

    data = _dataset(dataset)
    if not data.splits:
        raise InputError(f"dataset {dataset!r} has no splits, so there is nothing to check")
    for one in data.splits if split is None else (split,):
        check_request(data, one, 1 if limit is None else limit, seed)
    with progress() as report:
        found = [
            inspected(data, one, limit, seed, lambda what, done, total, one=one: report(f"{one}, {what}", done, total))  # type: ignore[misc]
            for one in (data.splits if split is None else (split,))
        ]
    if output is Format.json:
        import json

        say_json(json.dumps({"dataset": data.name, "splits": [one.to_dict() for one in found]}, indent=2))
    else:
        _print(data.name, found)
    if any(one.problems for one in found):
        raise typer.Exit(1)


@app.command("show")
def show(
    dataset: DatasetName,
    out: Annotated[Path, typer.Option(parser=path, help="Picture to write, PNG.")],
    index: Annotated[int, typer.Option(help="Number of the query in the split, from 0.")] = 0,
    split: Annotated[
        Optional[str], typer.Option(help="Split of the dataset.", show_default="val, or the only one")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw one query of a dataset: its image, its target, and the pixels that do not count."""
    from tokenprune.datasets.validation import check_request
    from tokenprune.report.files import check_drawing, check_targets
    from tokenprune.utils.arguments import whole_number

    check_drawing("data show")
    whole_number("index", index, 0)
    data = _dataset(dataset)
    if split is None:
        split = data.splits[0] if len(data.splits) == 1 else "val"
    check_request(data, split, index + 1, seed)
    check_targets({"--out": out})

    from tokenprune.evaluation.samples import sample
    from tokenprune.report.overlays import query_sheet, save

    scene, query = sample(data, split, index, seed)
    save(query_sheet(scene, query), out)
    typer.echo(f"wrote {out}: {query.text!r}")


def _dataset(name: str) -> Dataset:
    from tokenprune.datasets.by_name import dataset

    return dataset(name)


def _print(name: str, found: list[Inspection]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = NARROW_PIPE
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(escape(name), style="bold", overflow="fold")
    for one in found:
        table.add_column(escape(one.split), justify="right", overflow="fold")
    for section in _sections(found):
        for label, numbers in section:
            table.add_row(escape(label), *map(str, numbers))
        table.add_section()
    console.print(table)
    for one in found:
        for problem in one.problems[:SHOWN]:
            console.print(f"[red]{escape(one.split)}[/red]: {escape(problem.message)}", highlight=False, soft_wrap=True)
        if len(one.problems) > SHOWN:
            more = f"{len(one.problems) - SHOWN} more problems; --format json has all"
            console.print(f"[red]{escape(one.split)}[/red]: {more}", highlight=False)
        for warning in one.warnings:
            console.print(f"[yellow]warning[/yellow]: {escape(warning)}", highlight=False, soft_wrap=True)


def _sections(found: list[Inspection]) -> Iterator[list[tuple[str, list[int]]]]:
    """Labels and a number for each split: what is there, forms of images, problems; zeros of the last two left out."""
    from tokenprune.datasets.inspection import FORMS, PROBLEMS

    kinds = dict.fromkeys(kind for one in found for kind in one.kinds)
    yield [
        ("scenes", [one.scenes for one in found]),
        ("queries", [one.queries for one in found]),
        *((f"  of kind {kind}", [one.kinds[kind] for one in found]) for kind in kinds),
        ("  sentences", [one.sentences for one in found]),
        ("  for several objects", [one.several for one in found]),
        ("  empty targets", [one.empty for one in found]),
        ("  with ignored pixels", [one.with_ignored for one in found]),
        ("ignored pixels", [one.ignored_pixels for one in found]),
    ]
    forms = [(f"images: {form}", [one.forms[form] for one in found]) for form in FORMS]
    yield [row for row in forms if any(row[1])]
    problems = [(label, [one.count(kind) for one in found]) for kind, label in PROBLEMS.items()]
    yield [row for row in problems if any(row[1])] or [("problems", [0 for _ in found])]
