"""The commands sweep, merge and report: exit codes, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import Runner, assert_one_line, run
from sweep_folders import START, config_of, folder_of

import tokenprune as tp
from tokenprune.cli.printing import stopped
from tokenprune.sweeps.store import FILE
from tokenprune.testing.tiny_decoders import tiny_llama

__all__ = ["run"]  # the fixture

CONFIG: dict[str, Any] = {"models": "fake", "datasets": "rectangles", "strategies": ["whole"], "limit": 4}


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "sweep.json").write_text(json.dumps(config))
    return folder / "sweep.json"


@pytest.mark.parametrize("text", ["²/3", "1/³", "٢/٣", "2", "0/2", "3/2", "1/2/3", "/", "-1/2"])
def test_shards_that_are_none(run: Runner, tmp_path: Path, text: str) -> None:
    found = run("sweep", written(tmp_path, CONFIG), "--out", tmp_path / "run", "--shard", text)
    assert_one_line(found, f"--shard '{text}' found, expected I/N")


def test_nothing_could_run(run: Runner, tmp_path: Path) -> None:
    nothing = {**CONFIG, "strategies": ["fastv:layer=90", "fastv:layer=80"], "budgets": 0.5}
    found = run("sweep", written(tmp_path, nothing), "--out", tmp_path / "run")
    assert found.code == 2
    assert "fastv (layer=90) at 0.5, fake on rectangles (val, forced) did not run: " in found.err
    assert found.err.splitlines()[-1].endswith("error: none of 2 configurations could run, for the reasons above")
    some = {**nothing, "strategies": [*nothing["strategies"], "whole"]}
    assert run("sweep", written(tmp_path, some), "--out", tmp_path / "run").code == 0


def test_a_warning_is_given_once(run: Runner, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", START)
    (data / "b.png").unlink()
    for _ in range(2):
        config = written(tmp_path, config_of(data, entry={"missing": "skip"}))
        found = run("sweep", config, "--out", tmp_path / "run")
        assert found.code == 0
        assert found.err.count("their queries are left out") == 1


def test_a_lower_limit_is_shown(run: Runner, tmp_path: Path) -> None:
    """Every row is of the queries that are asked for now, in table and report."""
    from tokenprune.report import write_report

    out = tmp_path / "run"
    tp.sweep({**CONFIG, "limit": 9}, out)
    found = run("sweep", written(tmp_path, {**CONFIG, "strategies": ["whole", "front"], "limit": 3}), "--out", out)
    assert found.code == 0
    assert "fake on rectangles (val, forced), 3 queries" in found.out
    assert tp.read_results(out).groupby("label").size().tolist() == [3, 3]
    assert len(tp.read_results(out, every=True)) == 9 + 3
    text = write_report(out, tmp_path / "report.html")[0].read_text()
    assert "not all of" not in text
    assert "No pictures" not in text


@pytest.mark.parametrize("name", [FILE, "link.html", "sweep.json", "report"])
def test_a_report_replaces_no_other_file(run: Runner, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    tp.sweep(CONFIG, out)
    (out / "link.html").symlink_to(out / FILE)
    written(out, CONFIG)
    before = (out / FILE).read_bytes(), (out / "sweep.json").read_bytes()
    assert_one_line(run("report", out, "--out", out / name), "")
    assert ((out / FILE).read_bytes(), (out / "sweep.json").read_bytes()) == before


def test_the_last_line_of_an_interrupt_is_what_is_stored(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it came after a context was made, and before it was entered, which warns when it goes."""
    left: list[Any] = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        left.append(tp.prune(tiny_llama(), tp.strategy("fastv")))
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenprune.sweeps.run.sweep", interrupted)
    monkeypatch.setattr("tokenprune.cli.commands.sweep.stopped", lambda told: (stopped(told), left.clear())[0])
    found = run("sweep", written(tmp_path, CONFIG), "--out", tmp_path / "run")
    assert found.code == 130
    (last,) = found.err.splitlines()
    assert last.startswith("stopped; what was finished is stored in")
