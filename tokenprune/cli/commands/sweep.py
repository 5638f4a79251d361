"""`tokenprune sweep`: models × datasets × strategies × budgets × seeds, stored sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tokenprune.cli.arguments import Threads, path
from tokenprune.cli.printing import NARROW_PIPE, note, notes_console

if TYPE_CHECKING:
    from tokenprune.sweeps.run import Progress, Swept

INTERRUPTED = 130  # exit code after Ctrl-C, as shells give


def command(
    config: Annotated[Path, typer.Argument(parser=path, help="YAML file with models, datasets, strategies, …")],
    out: Annotated[Path, typer.Option(parser=path, help="Folder of the results; the same command goes on from it.")],
    shard: Annotated[
        Optional[str],  # noqa: UP045 - typer reads annotations at run time, on Python 3.10 too
        typer.Option(metavar="I/N", help="Only every N-th scene, from the I-th: one of N processes or machines."),
    ] = None,
    masks: Annotated[bool, typer.Option(help="Store masks and kept tokens, for the gallery of a report.")] = True,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although code or weights changed since.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Run a sweep, or go on with it; print accuracy with intervals.

    The file has the keys models, datasets, strategies, budgets, seeds, limit. Every scene is stored when it is done, so
    that the sweep may be stopped at any moment; the same command goes on.
    """
    try:
        found = _run(config, out, shard, masks, accept_changes, threads)
    except KeyboardInterrupt:
        note(f"stopped; what was finished is stored in {out}, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    show(found, out)


def _run(config: Path, out: Path, shard: str | None, masks: bool, accept_changes: bool, threads: int | None) -> Swept:
    from tokenprune.cli.models import quiet_loading
    from tokenprune.sweeps.config import read_config
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    part = None if shard is None else _shard(shard)
    given = read_config(config)

    from tokenprune.sweeps.run import sweep

    with _progress() as report:
        return sweep(
            given,
            out,
            shard=part,
            keep_masks=masks,
            accept_changes=accept_changes,
            progress=report,
            threads=choose(threads),
        )


def show(found: Swept, out: Path) -> None:
    """Print the summary of a store, and what could not run."""
    note(f"{found.records} records in {out}, {found.added} of them new")
    for label, reason in found.reasons.items():
        note(f"{label} did not run: {reason}")
    if not found.records:
        return
    from tokenprune.errors import InputError
    from tokenprune.sweeps.results import read_results

    try:
        table = read_results(out)
    except InputError as error:  # without pandas there is no table, but the records are stored
        note(str(error))
        return
    from rich.console import Console

    from tokenprune.sweeps.summary import summarised, summary_table

    console = Console()
    if not console.is_terminal:
        console.width = NARROW_PIPE
    console.print(summary_table(summarised(table)))


def _shard(text: str) -> tuple[int, int]:
    from tokenprune.errors import OptionError

    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise OptionError(f"--shard {text!r} found, expected I/N with I from 1 to N, such as 1/4")
    return int(number), int(count)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    bar = bars.Progress(*columns, console=notes_console())
    tasks: dict[str, bars.TaskID] = {}

    def report(now: Progress) -> None:
        bar.start()  # not earlier: an error on the first scene is then a single line
        if now.groups > 1:
            if "all" not in tasks:
                tasks["all"] = bar.add_task("all models and datasets", total=now.groups)
            bar.update(tasks["all"], completed=now.groups_done)
        if now.group not in tasks:
            tasks[now.group] = bar.add_task(now.group, total=now.total)
        bar.update(tasks[now.group], completed=now.done, total=now.total)

    try:
        yield report
    finally:
        if tasks:
            bar.stop()
