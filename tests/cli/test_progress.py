"""Progress of a sweep: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tokenprune.cli.progress import Lines

PROGRAM = """
from types import SimpleNamespace as Now
from tokenprune.cli.progress import reported
with reported() as report:
    for done in range(0, 41, 10):
        report(Now(group="one", done=done, total=40, all_done=done, all_total=80, groups=2))
    for done in range(0, 41, 10):
        report(Now(group="two", done=done, total=40, all_done=40 + done, all_total=80, groups=2))
"""


class Clock:
    """Stands still unless it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Now:
    """A `Progress`."""

    def __init__(self, done: int, total: int | None, all_done: int, all_total: int | None) -> None:
        self.group, self.done, self.total = "fake on rectangles (val)", done, total
        self.all_done, self.all_total, self.groups = all_done, all_total, 2


def test_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines: Any = Lines(clock)
    clock.now += 30  # the model is loaded
    for step in range(120):  # 100 records were there, and 10 come every second
        lines.report(Now(10 * step, 4000, 100 + 10 * step, 10100))
        clock.now += 1
    lines.report(Now(1200, None, 1300, None))
    clock.now += 60
    lines.report(Now(1210, None, 1310, None))
    assert capsys.readouterr().err.splitlines() == [
        "400 of 10100 records (4%), 16 min left; fake on rectangles (val): 300 of 4000",
        "1000 of 10100 records (10%), 15 min left; fake on rectangles (val): 900 of 4000",
        "1310 records; fake on rectangles (val): 1210",
    ]


def test_nothing_of_a_short_run_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_bars_on_a_terminal() -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # closed at the other end
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    last = shown.decode().rpartition("all records")[2]
    assert "80/80" in last
    assert "two" in last
    assert last.count("40/40") == 1  # that of the group before is gone
