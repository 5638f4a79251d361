"""`tokenprune demo`: what is refused before anything is served."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from cli_fixtures import Runner, assert_one_line, run

from tokenprune.demo import server
from tokenprune.utils.sockets import opened

__all__ = ["run"]


def test_without_the_extra(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    assert_one_line(run("demo"), "made with gradio, which is not installed", 'pip install "tokenprune-vlm[demo]"')


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "check_installed", lambda: None)


@pytest.mark.usefixtures("_installed")
def test_what_is_wrong_is_told_before_a_model_is_loaded(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tokenprune.cli.models.load_model", refuse)
    with opened("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run("demo", "--port", port), f"--port {port} cannot be used", "port 0 for any free one")
    assert_one_line(run("demo", "--port", 70000), "expected a number from 0 to 65535")
    assert_one_line(run("demo", "lisa-tinny"), "did you mean 'lisa-tiny'?")
    assert_one_line(run("demo", "--dtype", "float8"), "float8")
    assert_one_line(run("demo", "--threads", 0), "--threads")


@pytest.mark.usefixtures("_installed")
def test_the_address_is_told(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(server, "app_of", lambda model, uploads, threads: (model, threads))
    monkeypatch.setattr(server, "serve", lambda app, listening: served.append(app))
    ran = run("demo", "fake", "--port", 0, "--threads", 1)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("fake at http://127.0.0.1:")
    ((model, threads),) = served
    assert model.name == "fake"
    assert threads.count == 1
    assert "without a password" in run("demo", "fake", "--port", 0, "--host", "0.0.0.0").err
