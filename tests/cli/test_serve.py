"""`tokenprune serve`: what it refuses before it serves. Servers are tested in tests/serve."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run

from tokenprune.serve.limits import NEEDED, Limits, limits_of

__all__ = ["run"]
INSTALLED = all(importlib.util.find_spec(name) for name in NEEDED)
needs_extra = pytest.mark.skipif(not INSTALLED, reason="a server needs the extra: pip install -e '.[serve]'")


@pytest.mark.parametrize("lacking", [NEEDED[:1], NEEDED])
def test_a_missing_extra_is_one_line(run: Runner, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in lacking else find(name, *rest))
    assert_one_line(run("serve", "lisa-tiny"), "fastapi", 'pip install "tokenprune-vlm[serve]"')


@needs_extra
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("lisa-tinny",), ("lisa-tinny", "did you mean 'lisa-tiny'")),
        (("fake", "--queue", 0), ("--queue: 0 found", "at least 1")),
        (("fake", "--batch", 0), ("--batch: 0 found", "at least 1")),
        (("fake", "--port", 0, "--batch", 2), ("--batch has no effect on 'fake'",)),
        (("fake", "--max-upload-mb", 0), ("--max-upload-mb: 0.0 found", "above 0")),
        (("fake", "--max-upload-mb", "nan"), ("--max-upload-mb: nan found", "above 0")),
        (("fake", "--timeout", "inf"), ("--timeout: inf found", "above 0")),
        (("fake", "--max-pixels", 0), ("--max-pixels: 0 found", "at least 1")),
        (("fake", "--max-pixels", 10**9), ("--max-pixels: 1000000000 found", "decompression bomb")),
        (("fake", "--port", 70000), ("--port", "65535")),
        (("fake", "--host", "no.such.host.invalid"), ("no.such.host.invalid", "is not an address")),
        (("fake", "--strategy", "fastvv"), ("did you mean 'fastv'",)),
        (("fake", "--budget", 0.5), ("moves nothing",)),
        (("fake", "--strategy", "fastv", "--budget", 7), ("(0, 1]",)),
        (("fake", "--strategy", "front", "-o", "keap=1"), ("did you mean 'keep'",)),
        (("fake", "--device", "gpu7"), ("gpu7",)),
        (("fake", "--dtype", "int3"), ("int3",)),
        (("fake", "--threads", 0), ("--threads: 0",)),
    ],
)
def test_bad_input_is_one_clear_line(run: Runner, arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    assert_one_line(run("serve", *arguments), *parts)


@needs_extra
def test_a_port_in_use(run: Runner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run("serve", "fake", "--port", port), f"--port {port}", "in use", "0 for any free one")


@needs_extra
def test_a_model_that_cannot_be_served(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.api.load", lambda source, **options: torch.nn.Linear(1, 1))
    assert_one_line(run("serve", "fake", "--port", 0), "is a Linear, which makes no masks")


@needs_extra
def test_a_strategy_that_the_model_cannot_run(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.serve.server.serve", lambda *given: pytest.fail("it serves"))
    assert_one_line(run("serve", "lisa-tiny", "--port", 0, "--strategy", "fastv:layer=99"), "99", "12")


@needs_extra
def test_what_is_given_reaches_the_server(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenprune.serve.server

    told: list[Any] = []

    def serve(model: Any, listening: Any, choices: Any, limits: Limits, say: Any) -> None:
        told.extend((model.name, listening.getsockname()[0], repr(choices.default), limits))
        say("serving")

    monkeypatch.setattr(tokenprune.serve.server, "serve", serve)
    sizes = ("--queue", 5, "--max-upload-mb", 0.5, "--max-pixels", 1000, "--timeout", 2.5)
    own = ("--strategy", "front:layer=2", "-o", "keep=0.25")
    ran = run("serve", "fake", "--port", 0, *sizes, *own)
    assert (ran.code, ran.out) == (0, "serving\n"), ran.err
    assert told == ["fake", "127.0.0.1", "Front(keep=0.25, layer=2)", Limits(5, None, 524288, 1000, 2.5)]


def test_the_defaults_of_the_command_are_those_of_the_class() -> None:
    import inspect

    from tokenprune.cli.commands.serve import command

    given = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    names = ("queue", "batch", "max_upload_mb", "max_pixels", "timeout")
    assert limits_of(*(given[name] for name in names)) == Limits()
