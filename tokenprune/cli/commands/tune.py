"""`tokenprune tune`: search the options of a strategy under a budget, and confirm the best on another split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tokenprune.cli.arguments import Device, Dtype, ModelName, OptionTexts, Threads, VisionTower, path
from tokenprune.cli.printing import NARROW_PIPE, note, notes_console, stopped

if TYPE_CHECKING:
    from tokenprune.sweeps.tuning import Phase


def command(
    strategy: Annotated[str, typer.Argument(help="Name of a strategy; fixed options after a colon.")],
    out: Annotated[Path, typer.Option(parser=path, help="Folder of the results; the same command goes on from it.")],
    budget: Annotated[float, typer.Option(help="Equivalent image tokens as a share of all, in (0, 1].")] = 0.35,
    model: ModelName = "lisa-tiny",
    dataset: Annotated[str, typer.Option(help="Dataset, as in compare.")] = "shapes",
    split: Annotated[str, typer.Option(help="Split that is searched on.")] = "train",
    confirm_split: Annotated[str, typer.Option(help="Split that the search never sees.")] = "val",
    protocol: Annotated[str, typer.Option(help="How queries are asked, as in a sweep.")] = "forced",
    trials: Annotated[int, typer.Option(help="Combinations to run; refused and repeated ones do not count.")] = 50,
    limit: Annotated[int, typer.Option(help="Queries to search on.")] = 60,
    confirm_limit: Annotated[int, typer.Option(help="Queries to confirm on.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the search, and of random choices.")] = 0,
    option: OptionTexts = None,
    search: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time, on Python 3.10 too
        typer.Option(metavar="KEY=LO..HI|A,B", help="Values of an option that is searched; may be repeated."),
    ] = None,
    vision_tower: VisionTower = None,
    dtype: Dtype = None,
    device: Device = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although code or weights changed since.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Search the options of a strategy under a budget; confirm the best on another split, beside the default.

    -o fixes an option; the others are searched, over values derived from their types or given with --search. Every
    result is stored when it is there, so that the search may be stopped at any moment; the same command goes on.
    """
    from tokenprune.cli.models import quiet_loading
    from tokenprune.core.by_name import parse_options
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    loading = {"vision_tower": vision_tower and str(vision_tower), "dtype": dtype, "device": device}
    source = {"source": model, **{key: value for key, value in loading.items() if value is not None}}
    options = parse_options(option or [])

    from tokenprune.sweeps.tuning import tune
    from tokenprune.sweeps.tuning.tuned import FILE, tuned_table

    try:
        with _progress() as report:
            found = tune(
                strategy,
                out,
                budget=budget,
                model=source,
                dataset={"name": dataset, "protocol": protocol},
                split=split,
                confirm_split=confirm_split,
                trials=trials,
                limit=limit,
                confirm_limit=confirm_limit,
                seed=seed,
                options=options,
                search_for=search or [],
                accept_changes=accept_changes,
                progress=report,
                threads=choose(threads),
            )
    except KeyboardInterrupt:
        raise stopped(
            f"stopped; what was finished is stored in {out}, and the same command goes on from there"
        ) from None
    note(f"wrote {out / FILE}")
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = NARROW_PIPE
    console.print(tuned_table(found))


@contextmanager
def _progress() -> Iterator[Callable[[Phase], None]]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    bar = bars.Progress(*columns, console=notes_console())
    tasks: dict[str, Any] = {}

    def report(now: Phase) -> None:
        bar.start()  # not earlier: an error before the first result is then a single line
        if now.name not in tasks:
            tasks[now.name] = bar.add_task(now.name, total=now.total)
        best = "" if now.best is None else f", best gIoU {now.best:.3f}"
        bar.update(tasks[now.name], completed=now.done, total=now.total, description=f"{now.name}{best}")

    try:
        yield report
    finally:
        if tasks:
            bar.stop()
