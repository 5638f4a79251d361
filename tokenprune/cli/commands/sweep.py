"""`tokenprune sweep`: models × datasets × strategies × budgets × seeds, stored sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tokenprune.cli.arguments import Threads, path
from tokenprune.cli.printing import NARROW_PIPE, note, stopped

if TYPE_CHECKING:
    from tokenprune.sweeps.run import Swept


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
    engine: Annotated[
        str, typer.Option(help="local: in this process; ray: on the devices of a Ray cluster.")
    ] = "local",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST:PORT", help="Of a running Ray cluster, or auto; by default a new one is made here."),
    ] = None,
    timeout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="With --engine ray: seconds after which a scene is given to another device; 1800 if not given."
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Run a sweep, or go on with it; print accuracy with intervals.

    The file has the keys models, datasets, strategies, budgets, seeds, limit. Every scene is stored when it is done, so
    that the sweep may be stopped at any moment; the same command goes on.
    """
    try:
        part = None if shard is None else _shard(shard)
        found = _run(config, out, part, masks, accept_changes, engine, address, timeout, threads)
    except KeyboardInterrupt:
        raise stopped(
            f"stopped; what was finished is stored in {out}, and the same command goes on from there"
        ) from None
    try:
        show(found, out)
    except KeyboardInterrupt:
        raise stopped(
            f"stopped while the table was computed; all records are stored in {out}, and the same command prints it"
        ) from None
    if found.reasons and not found.ran:
        from tokenprune.errors import IncompatibleError

        raise IncompatibleError(f"none of {len(found.reasons)} configurations could run, for the reasons above")


def _run(
    config: Path,
    out: Path,
    shard: tuple[int, int] | None,
    masks: bool,
    accept_changes: bool,
    engine: str,
    address: str | None,
    timeout: float | None,
    threads: int | None,
) -> Swept:
    from tokenprune.cli.models import quiet_loading
    from tokenprune.cli.progress import reported
    from tokenprune.errors import OptionError
    from tokenprune.sweeps.config import check_engine, read_config
    from tokenprune.utils.threads import checked, choose

    quiet_loading()
    checked(threads, "--threads")
    check_engine(engine)
    if engine == "local" and (address, timeout) != (None, None):
        given = "--address" if address is not None else "--timeout"
        raise OptionError(f"{given} is for --engine ray; add that, or leave it out")
    read = read_config(config)

    from tokenprune.sweeps.run import sweep

    running: Any = engine
    if engine == "ray":
        from tokenprune.sweeps.ray_engine import TIMEOUT, RayEngine

        running = RayEngine(address, threads=threads, timeout=TIMEOUT if timeout is None else timeout)
    with reported() as report:
        return sweep(
            read,
            out,
            shard=shard,
            keep_masks=masks,
            accept_changes=accept_changes,
            progress=report,
            threads=choose(threads) if engine == "local" else None,
            engine=running,
        )


def show(found: Swept, out: Path) -> None:
    """Print the summary of a store, and what could not run."""
    answers = f", {found.answers} answers, {found.added_answers} of them new" if found.answers else ""
    note(f"{found.records} records in {out}, {found.added} of them new{answers}")
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
    if not (text.isascii() and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise OptionError(f"--shard {text!r} found, expected I/N with I from 1 to N, such as 1/4")
    return int(number), int(count)
