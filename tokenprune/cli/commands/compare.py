"""`tokenprune compare`: strategies side by side on one model and one dataset."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tokenprune.cli.arguments import Device, Dtype, ModelName, Threads, VisionTower, path
from tokenprune.cli.commands.listing import Format
from tokenprune.cli.printing import NARROW_PIPE, note, progress, say_json

if TYPE_CHECKING:
    from tokenprune.evaluation.comparison.results import Comparison

STRATEGIES = "none,blind,random,uniform,csp,fastv,prumerge+"


class Protocol(str, Enum):
    """How queries are asked; see `tokenprune.evaluation.protocols`."""

    forced = "forced"
    lisa = "lisa"
    glamm = "glamm"
    pixellm = "pixellm"
    generate = "generate"


def command(
    context: typer.Context,
    model: ModelName = "lisa-tiny",
    dataset: Annotated[str, typer.Option(help="Name of a dataset, name:PATH, or module:Class.")] = "shapes",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    protocol: Annotated[Protocol, typer.Option(help="How queries are asked.")] = Protocol.forced,
    strategies: Annotated[
        str, typer.Option(help="Names separated by commas; options after a colon, as in csp:query=seg.")
    ] = STRATEGIES,
    budget: Annotated[
        str, typer.Option(help="Equivalent image tokens as a share of all, in (0, 1]; several separated by commas.")
    ] = "0.35",
    limit: Annotated[int, typer.Option(help="Number of queries.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the dataset.")] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads annotations at run time, on Python 3.10 too
        typer.Option(parser=path, help="Folder for results.json, trade-off plots and overlay pictures."),
    ] = None,
    overlays: Annotated[int, typer.Option(min=0, help="Samples to draw with --out.")] = 4,
    timing_samples: Annotated[int, typer.Option(min=0, help="Queries that prefill is timed on; 0 = none.")] = 8,
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Metrics that plugins add, names separated by commas; "" = none.', show_default="all"),
    ] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
) -> None:
    """Compare strategies on one model and one dataset: accuracy, compute, KV cache and prefill time."""
    from tokenprune.cli.checks import check_metrics, check_model, check_strategies, given, refuse_given
    from tokenprune.cli.models import load_model, quiet_loading
    from tokenprune.core.by_name import parse_text, split_list
    from tokenprune.datasets.validation import check_request
    from tokenprune.evaluation.contenders import budgets_of, contenders
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    chosen, budgets = split_list(strategies), budgets_of(numbers(budget))
    added = None if metrics is None else [part.strip() for part in metrics.split(",") if part.strip()]
    if out is None:
        refuse_given(context, ["overlays"], "without --out")
    check_strategies(parse_text(item)[0] for item in chosen)
    check_metrics(added or ())
    check_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    data = check_request(dataset, split, limit, seed)
    if out is not None:
        from tokenprune.report.files import check_drawing
        from tokenprune.report.write import unused_folder

        check_drawing("--out")
        unused_folder(out)
    contenders(chosen, budgets)  # checks options of strategies, whose modules import torch

    from tokenprune.evaluation.comparison.compare import compare

    loaded = load_model(model, vision_tower=vision_tower, dtype=dtype, device=device)
    with progress() as report:
        found = compare(
            loaded,
            data,
            chosen,
            budgets if len(budgets) > 1 else budgets[0],
            split,
            limit,
            seed,
            protocol=protocol.value,
            timing_samples=timing_samples,
            records=overlays if out is not None else 0,
            progress=report,
            extra_metrics=added,
            threads=choose(threads),
        )
    timed = found.environment["timing_samples"]
    if given(context, "timing_samples") and int(timed) < timing_samples:
        note(f"prefill was timed on {timed} queries instead of {timing_samples}: on one of each image")
    asked = model.encode(errors="surrogateescape").decode(errors="replace")  # a folder's name may be invalid Unicode
    found = found.model_copy(update={"model": asked})  # as requested, not the folder's name
    try:  # write the files before printing, which may fail
        if out is not None:
            _write(found, out)
    finally:
        _show(found, output, is_kept=out is not None)
    if any(row.failed for row in found.rows):
        raise typer.Exit(1)  # a script must not take a table that lacks a strategy for a success


def _write(found: Comparison, out: Path) -> None:
    from tokenprune.report.write import write_comparison
    from tokenprune.utils.files import expanded

    written = write_comparison(found, out)
    folder = written[0].parent
    if folder != expanded(out):
        note(f"another run wrote its results to {out} meanwhile; these are kept apart")
    note(f"wrote {len(written)} files to {folder}: {', '.join(path.name for path in written)}")


def _show(found: Comparison, output: Format, is_kept: bool) -> None:
    try:
        if output is Format.json:
            say_json(found.to_json())
        else:
            from rich.console import Console

            console = Console()
            if not console.is_terminal:
                console.width = NARROW_PIPE
            console.print(found.table())
    except BrokenPipeError:
        raise  # the reader has closed the pipe
    except OSError:
        if not is_kept:
            note(found.to_json())
        raise


def numbers(text: str) -> list[float]:
    """The budgets of --budget. Raises BudgetError if they are not numbers."""
    from tokenprune.errors import BudgetError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BudgetError(f"budget: {text!r} found, expected numbers in (0, 1] separated by commas") from error
