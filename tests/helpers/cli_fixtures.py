"""Running the command line in process, on the fake model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_segmentation import FakePlugin

from tokenprune.cli.app import main
from tokenprune.plugins import registry


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Runner = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Runner]:
    """`run("compare", "--limit", 2)` through the real `main`, with everything fake registered."""
    folder = tmp_path / "fake-model"
    folder.mkdir()
    registry.register_plugin(FakePlugin(folder), "fakes")

    def call(*arguments: object) -> Ran:
        code: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            code = done.code
        captured = capsys.readouterr()
        return Ran(int(code or 0) if not isinstance(code, str) else 1, captured.out, captured.err)

    yield call
    registry.unregister_plugin("fakes")


def assert_one_line(ran: Ran, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds all parts; nothing on stdout, no traceback."""
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
