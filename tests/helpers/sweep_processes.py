"""Sweeps as processes of their own, on the fake model, and what their stores must have in common."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from plugin_packages import install

from tokenprune.sweeps.store import FILE

HERE = Path(__file__).parent
PATIENCE = 300.0  # seconds that a process may take to get somewhere

CONFIG: dict[str, Any] = {
    "models": "fake",
    "datasets": "rectangles",
    "strategies": ["whole", "front", "tour"],
    "budgets": [0.5, 0.25],
    "seeds": [0, 3],
    "limit": 40,
}
# A package that registers the fake model, its data and its strategies.
PLUGIN = """
from pathlib import Path
from fake_segmentation import FakePlugin

_fakes = FakePlugin(Path({folder!r}))
tokenprune_register_strategies = _fakes.tokenprune_register_strategies
tokenprune_register_datasets = _fakes.tokenprune_register_datasets
tokenprune_register_adapters = _fakes.tokenprune_register_adapters
tokenprune_register_models = _fakes.tokenprune_register_models
"""
# The command, which dies before the n-th statement that it gives to SQLite.
DYING = """
import os, signal, sqlite3, sys

left, opened = int(sys.argv.pop(1)), sqlite3.connect

def count(statement):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def connect(*arguments, **options):
    connection = opened(*arguments, **options)
    connection.set_trace_callback(count)
    return connection

sqlite3.connect = connect
from tokenprune.cli.app import main
main(sys.argv[1:])
"""
# What differs between two runs of the same sweep: when, where and how fast.
OF_THE_RUN = {"milliseconds", "environment"}


def fake_package(folder: Path) -> Path:
    """A folder for PYTHONPATH with an installed package `fake-plugin`."""
    (folder / "model").mkdir()
    install(folder, "fake-plugin", PLUGIN.format(folder=str(folder / "model")))
    return folder


def started(packages: Path, *arguments: object, dying: int | None = None) -> subprocess.Popen[str]:
    """`python -m tokenprune …` with the package; dying=n: killed before its n-th SQL statement."""
    program = ["-m", "tokenprune"] if dying is None else ["-c", DYING, str(dying)]
    path = os.pathsep.join(filter(None, (str(packages), str(HERE), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        preexec_fn=hear_interrupts,
    )


def hear_interrupts() -> None:
    """Run in a new process: what a shell starts in the background ignores Ctrl-C, and so do its own processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a process that ends by itself."""
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err


def until_stored(process: subprocess.Popen[str], folder: Path, records: int) -> None:
    """Wait until a running sweep has stored at least that many records."""
    limit = time.monotonic() + PATIENCE
    while stored(folder) < records:
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"{stored(folder)} records, expected {records}: {finished(process)}")
        time.sleep(0.005)


def killed(process: subprocess.Popen[str]) -> None:
    """Kill a process, or find that it has ended."""
    process.kill()
    assert finished(process)[0] in (0, -signal.SIGKILL)


def stored(folder: Path) -> int:
    """Records in a store, 0 where none is; another process may be writing."""
    if not (folder / FILE).is_file():
        return 0
    with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True, timeout=10)) as connection:
        try:
            (found,) = connection.execute("SELECT COUNT(*) FROM records").fetchone()
        except sqlite3.OperationalError:  # no tables yet
            return 0
    return int(found)


def content(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of a store, but for what differs between two runs of the same sweep."""
    found: dict[str, list[dict[str, Any]]] = {}
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.row_factory = sqlite3.Row
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        for table in ("configurations", "scenes", "records"):
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()
            found[table] = [{key: row[key] for key in row.keys() if key not in OF_THE_RUN} for row in rows]  # noqa: SIM118
    return found
