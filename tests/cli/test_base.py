"""The command line by its real entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenprune import __version__
from tokenprune.plugins.entries import KINDS

PROGRAM = Path(sys.executable).parent / "tokenprune"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program, or `code` in a fresh interpreter with the arguments in `sys.argv`."""
    command = [str(PROGRAM)] if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_help_needs_no_torch() -> None:
    code = """
import sys
from tokenprune.cli.app import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "transformers", "numpy", "sklearn", "matplotlib"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""
    done = run(code=code)
    assert done.returncode == 0
    assert "heavy: []" in done.stdout
    assert "list" in done.stdout


def test_program_and_module_are_the_same() -> None:
    module = subprocess.run([sys.executable, "-m", "tokenprune", "--version"], capture_output=True, text=True)
    assert module.stdout == run("--version").stdout == f"tokenprune {__version__}\n"


def test_list_as_table_and_json() -> None:
    table = run("list")
    assert table.returncode == 0
    for name in ("fastv", "lisa", "shapes", "lisa-tiny"):
        assert name in table.stdout
    found = json.loads(run("list", "--format", "json").stdout)
    assert set(found) == {*KINDS, "broken", "collisions"}
    (fastv,) = [entry for entry in found["strategies"] if entry["name"] == "fastv"]
    assert (fastv["package"], fastv["version"]) == ("tokenprune-vlm", __version__)
    assert found["broken"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("lst",), ("no such command 'lst'", "Did you mean 'list'?", "see 'tokenprune --help'")),
        (("list", "--pluginz"), ("--pluginz", "--plugins", "see 'tokenprune list --help'")),
        (("list", "--format", "jsn"), ("--format", "'jsn' is not one of 'table', 'json'", "tokenprune list --help")),
        (("segment", "a.png", "red"), ("issing option '--out'", "see 'tokenprune segment --help'")),
        (("segment",), ("issing", "see 'tokenprune segment --help'")),
        (("answer", "a.png", "q"), ("issing option '--model'", "see 'tokenprune answer --help'")),
        (("compare", "--limit", "x"), ("--limit", "see 'tokenprune compare --help'")),
        (("segment", "", "red", "--out", "m.png"), ("an empty path found", "see 'tokenprune segment --help'")),
        (("segment", "a.png", "red", "--out", ""), ("'--out': an empty path found",)),
        (("new", "strat", "x"), ("no such command 'strat'", "see 'tokenprune new --help'")),
        (("new", "strategy", "x", "--into", ""), ("'--into': an empty path found",)),
    ],
)
def test_what_is_misspelt_is_told_in_one_line(arguments: tuple[str, ...], told: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert all(part in done.stderr for part in told), done.stderr


@pytest.mark.parametrize("arguments", [(), ("new",)])
def test_without_arguments_the_help_is_shown(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage: tokenprune" in done.stdout + done.stderr
    assert "error" not in done.stderr


FAILING = """
import sys
from tokenprune.cli import app
from tokenprune.cli.commands import listing
from tokenprune.errors import InputError

@app.app.command()
def fail():
    raise InputError("photo.png: found text,\\n expected an image")

@app.app.command()
def invalid():
    import pydantic
    class Options(pydantic.BaseModel):
        keep: float
    Options(keep="all")

@app.app.command()
def crash():
    raise RuntimeError("a bug")

app.main(sys.argv[1:])
"""


def test_user_error_is_one_line_and_code_2() -> None:
    done = run("fail", code=FAILING)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: photo.png: found text, expected an image\n"


@pytest.mark.parametrize("arguments", [("--debug", "fail"), ("fail", "--debug")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, code=FAILING)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: photo.png: found text, expected an image"


def test_pydantic_error_is_a_user_error() -> None:
    done = run("invalid", code=FAILING)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Options: option 'keep': found 'all', but ")
    assert len(done.stderr.splitlines()) == 1


def test_bug_is_not_hidden() -> None:
    done = run("crash", code=FAILING)
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
