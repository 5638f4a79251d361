"""A command loses nothing: what it writes is written before it prints, and printing fails quietly or in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from cli_fixtures import Ran, Runner, assert_one_line, run
from fake_segmentation import FakeData, FakeModel
from PIL import Image

from tokenprune import hookimpl
from tokenprune.errors import InputError
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.plugins import registry
from tokenprune.report.write import unused_folder, write_comparison

__all__ = ["run"]  # the fixture

FAKE = ("--model", "fake", "--dataset", "rectangles", "--limit", 2, "--timing-samples", 0, "--strategies", "none")
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which stands for a full disk")
PATH = os.pathsep.join(filter(None, (str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH"))))

# The fake model in a process of its own, whose stdout the shell sets up; arguments: a folder, then the command's.
PROGRAM = """
import sys
from pathlib import Path
from fake_segmentation import FakePlugin
from tokenprune.plugins import registry
from tokenprune.cli.app import main
registry.register_plugin(FakePlugin(Path(sys.argv[1])), "fakes")
main(sys.argv[2:])
"""


def in_shell(folder: Path, line: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `line` in bash with the program and the fake model as "$@"; the exit code is that of the program."""
    return _in_shell(line, ["-c", PROGRAM, str(folder), *map(str, arguments)], environment)


def _in_shell(line: str, python: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *python]
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}", "bash", *program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": PATH, **environment},
    )


def broken_pipe() -> IO[str]:
    """A stream that nobody reads from any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def full_disk() -> IO[str]:
    """A stream into a full disk."""
    return open("/dev/full", "w", encoding="utf-8")


@pytest.mark.parametrize(
    ("out", "err", "code", "message", "format_"),
    [
        (broken_pipe, None, 1, "", "table"),
        (broken_pipe, None, 1, "", "json"),
        (broken_pipe, broken_pipe, 1, None, "table"),
        pytest.param(full_disk, None, 2, "error: standard output cannot be written (No space", "json", marks=FULL),
        pytest.param(None, full_disk, 0, None, "table", marks=FULL),
    ],
)
def test_a_comparison_is_written_whatever_becomes_of_stdout(
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: Callable[[], IO[str]] | None,
    err: Callable[[], IO[str]] | None,
    code: int,
    message: str | None,
    format_: str,
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        for name, opened in (("stdout", out), ("stderr", err)):
            if opened is not None:
                patched.setattr(sys, name, opened())
        ran = run("compare", *FAKE, "--out", folder, "--overlays", 1, "--format", format_)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    if message is not None:
        assert message in ran.err
        assert f"wrote 4 files to {folder}" in ran.err
    found = json.loads((folder / "results.json").read_text())
    assert [row["strategy"] for row in found["rows"]] == ["none"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["overlay-0-red-thing.png", "results.json", "tradeoff-agreement.png", "tradeoff-giou.png"]
    assert all((folder / name).stat().st_size > 0 for name in names)


@FULL
def test_without_a_folder_the_result_goes_to_stderr_where_stdout_is_full(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full_disk())
        ran = run("compare", *FAKE)
    assert ran.code == 2
    start, end = ran.err.index("{"), ran.err.rindex("}")
    assert json.loads(ran.err[start : end + 1])["rows"][0]["strategy"] == "none"
    assert ran.err.splitlines()[-1].startswith("error: standard output cannot be written")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_stdout_of_any_encoding(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    strategies = ("--strategies", "front:note=Ä–ж😀")
    printed = {}
    for format_ in ("table", "json"):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
            written = ("--out", tmp_path / "out") if format_ == "table" else ()
            ran = run("compare", *FAKE, *strategies, *written, "--format", format_)
            printed[format_] = sys.stdout.buffer.getvalue()
        assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["given"] == {"note": "Ä–ж😀"}
    assert b"gIoU" in printed["table"]
    decoded = printed["json"].decode("utf-8" if encoding == "ascii" else encoding)  # Typer prints UTF-8 to ASCII
    assert json.loads(decoded)["rows"][0]["given"] == {"note": "Ä–ж😀"}


def test_the_program_itself_ends_quietly_where_nobody_reads(tmp_path: Path) -> None:
    done = in_shell(tmp_path, '"$@" 2>&1 | true', "compare", *FAKE, "--out", tmp_path / "out", "--overlays", 0)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["strategy"] == "none"


@pytest.mark.parametrize("command", [("--help",), ("list",), ("list", "--format", "json")])
@FULL
def test_every_command_fails_in_one_line_where_stdout_is_full(command: tuple[str, ...]) -> None:
    done = _in_shell('"$@" >/dev/full', ["-m", "tokenprune", *command], {})
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written (No space left on device); send it elsewhere\n"
    closed = _in_shell('"$@" | true', ["-m", "tokenprune", *command], {})
    assert (closed.returncode, closed.stderr) == (1, "")


def test_a_files_name_that_is_no_text_is_printed_as_it_came(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (30, 20), (200, 20, 20)).save(tmp_path / "p.png")
    mask = os.fsencode(tmp_path) + b"/m\xff.png"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        ran = run("segment", tmp_path / "p.png", "thing", "--model", "fake", "--out", os.fsdecode(mask))
        printed = sys.stdout.buffer.getvalue()
    assert (ran.code, ran.err) == (0, "")
    assert b"wrote " + mask in printed
    with Image.open(mask) as written:
        assert written.size == (30, 20)


def test_results_of_a_folder_whose_name_is_no_text(run: Runner, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    odd.mkdir()
    (odd / "config.json").write_text('{"architectures": ["Fake"]}')
    ran = run("compare", "--model", odd, *FAKE[2:], "--out", tmp_path / "out", "--overlays", 0)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"] == f"{tmp_path}/m\ufffd"


@pytest.mark.parametrize(
    ("stream", "code"), [(broken_pipe, 1), pytest.param(full_disk, 2, marks=FULL)], ids=["pipe", "disk"]
)
def test_a_plugins_command_is_not_blamed_for_stdout(
    run: Runner, monkeypatch: pytest.MonkeyPatch, stream: Callable[[], IO[str]], code: int
) -> None:
    class Census:
        @hookimpl
        def tokenprune_register_commands(self, register: Any) -> None:
            register("census", lambda: print("7", flush=True))

    registry.register_plugin(Census(), "census")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream())
            ran = run("census")
    finally:
        registry.unregister_plugin("census")
    assert ran.code == code
    assert "plugin" not in ran.err
    assert ran.err.startswith("error: standard output") is (code == 2)


@pytest.mark.parametrize(
    ("stream", "code"), [(broken_pipe, 1), pytest.param(full_disk, 2, marks=FULL)], ids=["pipe", "disk"]
)
@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_every_image_is_segmented_whatever_becomes_of_the_streams(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Callable[[], IO[str]], code: int, where: str
) -> None:
    (tmp_path / "album").mkdir()
    for name, colour in (("a.png", (200, 20, 20)), ("b.png", (20, 20, 200)), ("d.png", (0, 90, 0))):
        Image.new("RGB", (30, 20), colour).save(tmp_path / "album" / name)
    (tmp_path / "album" / "c.png").write_text("no picture")
    masks, sheets = tmp_path / "masks", tmp_path / "sheets"
    with monkeypatch.context() as patched:
        patched.setattr(sys, where, stream())
        given = ("--model", "fake", "--out", masks, "--overlay", sheets)
        ran = run("segment", tmp_path / "album", "thing", *given)
    for folder in (masks, sheets):
        assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "d.png"]
        for path in folder.iterdir():
            with Image.open(path) as written:
                written.load()
    if where == "stderr":  # which only says that one of the images was none
        assert ran.code == 1
        assert ran.out.count("wrote ") == 3  # a line for each image
    else:
        assert ran.code == code
        assert "c.png" in ran.err
        assert ran.err.splitlines()[-1].startswith("error: standard output") is (code == 2)


def test_a_second_run_into_one_folder_is_refused_before_it_starts(run: Runner, tmp_path: Path) -> None:
    assert run("compare", *FAKE, "--out", tmp_path / "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run("compare", *FAKE[:-1], "blind", "--out", tmp_path / "out")
    assert_one_line(again, "holds the results of another run (results.json)", "choose another folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["results.json", "tradeoff-giou.png", "overlay-3-thing.png"])
def test_any_file_of_a_run_makes_a_folder_used_and_others_do_not(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert unused_folder(tmp_path) == tmp_path
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=name):
        unused_folder(tmp_path)


def test_runs_that_finish_in_one_folder_at_the_same_time_are_kept_apart(tmp_path: Path) -> None:
    found = compare(FakeModel(), FakeData(), ["none"], limit=2, timing_samples=0, records=1)
    runs = [found.model_copy(update={"model": f"model-{number}"}) for number in range(4)]
    start, written = threading.Barrier(4), dict[int, list[Path]]()

    def write(number: int) -> None:
        start.wait()
        written[number] = write_comparison(runs[number], tmp_path)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    homes = {number: {path.parent for path in paths} for number, paths in written.items()}
    assert all(len(home) == 1 for home in homes.values())
    expected = {tmp_path, tmp_path / "run-2", tmp_path / "run-3", tmp_path / "run-4"}
    assert set.union(*homes.values()) == expected
    for number, (home,) in homes.items():
        assert json.loads((home / "results.json").read_text())["model"] == f"model-{number}"


def test_a_run_that_comes_second_says_where_its_results_are(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Meanwhile:
        @hookimpl
        def tokenprune_register_metrics(self, register: Any) -> None:
            register("slow", self.write)

        def write(self, measured: Any) -> None:
            (out / "results.json").write_text("of another run")

    registry.register_plugin(Meanwhile(), "meanwhile")
    try:
        ran = run("compare", *FAKE, "--out", out, "--overlays", 0)
    finally:
        registry.unregister_plugin("meanwhile")
    assert ran.code == 0
    assert "another run wrote its results" in ran.err
    assert str(out / "run-2") in ran.err
    assert (out / "results.json").read_text() == "of another run"
    assert json.loads((out / "run-2" / "results.json").read_text())["rows"]


def test_the_table_is_printed_where_the_pictures_cannot_be_written(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    ran = run("compare", *FAKE, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "gIoU" in ran.out
    assert "tradeoff-giou.png' cannot be written (No space left on device)" in ran.err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_stdout_of_a_test_is_left_alone(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    ran: Ran = run("list")
    assert ran.code == 0
    assert "fastv" in stream.getvalue()
