"""The observer: a line for every decision, nothing where no file is named, and runs are what they are without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenprune_decision_log.plugin import VARIABLE

import tokenprune as tp
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

PROMPT = torch.arange(20)[None]
IMAGE_TOKENS = (PROMPT > 1) & (PROMPT < 18)


def run_once() -> torch.Tensor:
    model = tiny_llama()
    with torch.inference_mode(), tp.prune(model, tp.strategy("uniform", keep=4), image_tokens=IMAGE_TOKENS):
        return model(PROMPT).logits


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "decisions.jsonl"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_installed() -> None:
    found = [plugin for plugin in registry.plugins() if plugin.distribution == "tokenprune-decision-log"]
    assert [(plugin.name, plugin.status) for plugin in found] == [("decision-log", "works")]


def test_a_line_for_every_decision(log: Path) -> None:
    run_once()
    (line,) = lines(log)
    assert line["strategy"] == "Uniform(keep=4)"
    assert (line["kind"], line["layer"]) == ("keep", 0)
    (active,) = line["active"]
    assert len(active) == 4
    assert active == sorted(active)
    assert line["dropped"] == [12]
    assert line["parked"] == [0]


def test_later_runs_are_appended(log: Path) -> None:
    run_once()
    run_once()
    first, second = lines(log)
    assert first["active"] == second["active"]


def test_nothing_is_written_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    expected = run_once()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(VARIABLE, "decisions.jsonl")
    torch.testing.assert_close(run_once(), expected, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.jsonl"]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(tp.TokenPruneError, match="decision-log"):
        run_once()
