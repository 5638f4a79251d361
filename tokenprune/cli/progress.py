"""How far a sweep, or a run over images, is: bars on a terminal; of a sweep else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenprune.cli.printing import note, notes_console

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tokenprune.sweeps.run import Progress

ALL = "all records"
EVERY = 60.0  # seconds between lines in a file or a pipe


@contextmanager
def reported() -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress on stderr while the context is open."""
    console = notes_console()
    if not console.is_terminal:
        yield Lines().report
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = bars.Progress(*columns, console=console, speed_estimate_period=600)
    tasks: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int | None) -> None:
        if name not in tasks:
            for before in tasks.keys() - {ALL}:  # there may be more groups than lines
                bar.update(tasks[before], visible=False)
            tasks[name] = bar.add_task(name, total=total, completed=done)
        else:
            bar.update(tasks[name], completed=done, total=total)

    def report(now: Progress) -> None:
        bar.start()  # not earlier: an error on the first scene is then a single line
        if now.groups > 1:
            show(ALL, now.all_done, now.all_total)
        show(now.group, now.done, now.total)

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function for the number that are done, of `total`: a bar on stderr with the time left, if that is a terminal.

    Lines that are printed meanwhile stand above the bar.
    """
    console = notes_console()
    if not console.is_terminal:
        yield lambda done: None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
    )
    # Rich moves redirected output to its own console, stderr: right on a terminal, wrong for a pipe.
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    with bars.Progress(*columns, console=console, redirect_stdout=on_terminal, speed_estimate_period=600) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class Lines:
    """At most one line a minute, with what is done, what is left, and how long it will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._told = clock()
        self._before: int | None = None

    def report(self, now: Progress) -> None:
        """Perhaps write a line."""
        time = self._clock()
        if self._before is None:  # what came before was loading the model
            self._before, self._start = now.all_done, time
        if time - self._told < EVERY:
            return
        self._told = time
        text = f"{now.all_done} records"
        new = now.all_done - self._before
        if now.all_total is not None:
            text = f"{now.all_done} of {now.all_total} records ({now.all_done / max(now.all_total, 1):.0%})"
            if new:
                text += f", {_duration((time - self._start) * (now.all_total - now.all_done) / new)} left"
        note(f"{text}; {now.group}: {now.done}" + ("" if now.total is None else f" of {now.total}"))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(minutes, 1)} min"
