"""Sweeps that are killed, interrupted, out of space or doubled: what is stored is whole, and they go on."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_processes import CONFIG, content, fake_package, finished, killed, started, stored, until_stored

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.sweeps.store import FILE, writing

pytestmark = pytest.mark.usefixtures("fakes")

RECORDS = 2 * 40 * 4  # front at two budgets
STATEMENTS = 750  # about, of the whole sweep


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_package(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert tp.sweep(CONFIG, folder, threads=1).added == RECORDS
    return folder


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(CONFIG))
    return "sweep", path, "--out", tmp_path / "run", "--threads", 1


def assert_whole_scenes(folder: Path) -> None:
    """Every scene has its two queries, and is noted as run."""
    if not stored(folder):
        return
    found = content(folder)
    records = {(row["configuration"], row["scene"], row["query"]) for row in found["records"]}
    assert len(records) == len(found["records"])
    assert all((hashed, scene, 1 - query) in records for hashed, scene, query in records)
    assert len(records) == 4 * sum(row["queries"] for row in found["scenes"])


def goes_on(folder: Path, whole: Path) -> None:
    """The rest runs, and the store is that of a run that nothing disturbed."""
    assert_whole_scenes(folder)
    before = stored(folder)
    assert tp.sweep(CONFIG, folder, threads=1).added == RECORDS - before
    assert content(folder) == content(whole)


def test_killed_before_any_statement(packages: Path, command: tuple[object, ...], tmp_path: Path, whole: Path) -> None:
    draw, out = random.Random(7), tmp_path / "run"
    for number in (3, draw.randint(40, STATEMENTS // 2)):  # while the tables are made; anywhere
        code, err = finished(started(packages, *command, dying=number))
        assert (code, err) == (-signal.SIGKILL, "")
        assert_whole_scenes(out)
    assert 0 < stored(out) < RECORDS
    goes_on(out, whole)


def test_killed_while_it_runs(packages: Path, command: tuple[object, ...], tmp_path: Path, whole: Path) -> None:
    process = started(packages, *command)
    until_stored(process, tmp_path / "run", RECORDS // 8)
    killed(process)
    goes_on(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_twenty_times(packages: Path, command: tuple[object, ...], tmp_path: Path, whole: Path) -> None:
    draw, out = random.Random(), tmp_path / "run"
    print("seed of the draw:", seed := draw.randrange(10**6))
    draw.seed(seed)
    for number in range(20):
        if number % 2:
            finished(started(packages, *command, dying=draw.randint(1, STATEMENTS // 8)))
        else:
            process = started(packages, *command)
            until_stored(process, out, min(stored(out) + 8, RECORDS))
            time.sleep(draw.uniform(0, 0.05))
            killed(process)
        assert_whole_scenes(out)
    goes_on(out, whole)


def test_interrupted_and_two_writers(packages: Path, command: tuple[object, ...], tmp_path: Path, whole: Path) -> None:
    first = started(packages, *command)
    until_stored(first, tmp_path / "run", 8)
    first.send_signal(signal.SIGSTOP)  # or it may end while the second one begins
    with pytest.raises(InputError, match="run' is being written by another process; wait for it"):
        tp.sweep(CONFIG, tmp_path / "run")
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    code, err = finished(first)
    assert code == 130
    assert err.splitlines()[-1] == (
        f"stopped; what was finished is stored in {tmp_path / 'run'}, and the same command goes on from there"
    )
    assert "Traceback" not in err
    assert 0 < stored(tmp_path / "run") < RECORDS
    goes_on(tmp_path / "run", whole)


def test_a_second_process_is_refused(packages: Path, command: tuple[object, ...], tmp_path: Path) -> None:
    with writing(tmp_path / "run"):
        code, err = finished(started(packages, *command))
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "run' is being written by another process; wait for it, or give another folder" in err
    assert stored(tmp_path / "run") == 0


def test_a_full_disk(packages: Path, command: tuple[object, ...], tmp_path: Path, whole: Path) -> None:
    disk = tmp_path / "run"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here, which would stand for a full disk")
    try:
        code, err = finished(started(packages, *command))
        assert code == 2, err
        assert "run/results.sqlite': the disk is full; make room, and give the same command" in err.splitlines()[-1]
        assert 0 < stored(disk) < RECORDS
        assert_whole_scenes(disk)
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        goes_on(disk, whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("pages", [1, 30])
def test_a_store_that_cannot_grow(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    opened = sqlite3.connect

    def limited(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = opened(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", limited)
    with pytest.raises(InputError, match="the disk is full; make room, and give the same command"):
        tp.sweep(CONFIG, tmp_path, threads=1)
    monkeypatch.undo()
    assert (stored(tmp_path) > 0) == (pages > 1)
    goes_on(tmp_path, whole)


def test_errors_of_a_model_are_not_those_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the camera is broken")

    monkeypatch.setattr("fake_segmentation.FakeModel.encode_image", fail)
    with pytest.raises(OSError, match="the camera is broken"):
        tp.sweep(CONFIG, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        tp.sweep(CONFIG, tmp_path / "run")


def test_a_store_of_which_only_the_file_was_made(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / FILE).close()
    (tmp_path / FILE).touch()
    with pytest.raises(InputError, match="holds no results of a sweep"):
        tp.read_results(tmp_path)
    assert tp.sweep({**CONFIG, "limit": 2}, tmp_path).added == 16
