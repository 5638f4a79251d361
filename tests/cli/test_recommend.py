"""`tokenprune recommend` through its entry point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_fixtures import Runner, assert_one_line, run

__all__ = ["run"]  # the fixture

QUICK = ("recommend", "--image-tokens", 16, "--rounds", 1)
SHAPE = ("--model-shape", "7b", "--layers", 6)


def small_config(folder: Path) -> Path:
    path = folder / "config.json"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 32}
    path.write_text(json.dumps({**sizes, "vocab_size": 64}))
    return path


def test_a_table_on_stdout_and_progress_on_stderr(run: Runner) -> None:
    ran = run(*QUICK, "--strategies", "fastv,cdpruner")
    assert ran.code == 0, ran.err
    for text in ("lisa-tiny: 12 layers of width 192", "fastv at 0.35", "not shown", "0.676", "cdpruner at 0.35"):
        assert text in ran.out
    assert "rounds" in ran.err
    assert "rounds ━" not in ran.out


def test_json_is_one_object_and_the_file_is_the_same(run: Runner, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    ran = run(
        *QUICK, "--image-tokens", 32, "--batch", 2, "--strategies", "fastv", "--budget", "0.5,0.35", "--format", "json",
        "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found == json.loads(out.read_text())
    assert (found["model"], found["layers"], found["hidden"], found["rounds"]) == ("lisa-tiny", 12, 192, 1)
    sizes = [(row["budget"], row["image_tokens"], row["batch"]) for row in found["timings"]]
    assert sizes == [(0.5, 16, 2), (0.5, 32, 2), (0.35, 16, 2), (0.35, 32, 2)]
    assert {row["budget"]: row["accuracy"][0]["model"] for row in found["strategies"]} == {
        0.5: "lisa-tiny",
        0.35: "lisa-tiny",
    }


def test_random_weights_of_a_shape(run: Runner, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    ran = run(*QUICK, "--model-shape", config, "--layers", 6, "--strategies", "prumerge+", "--budget", 0.5)
    assert ran.code == 0, ran.err
    assert "config.json with random weights: 6 layers of width 32" in ran.out
    assert "yours may differ" in ran.out


def test_milliseconds_that_nothing_fits_into_fail_after_the_table(run: Runner) -> None:
    ran = run(*QUICK, "--rounds", 6, "--strategies", "fastv:budget=0.5", "--budget-ms", 0.001)
    assert ran.code == 2
    assert "Nothing fits into 0.001 ms." in ran.out
    assert "error: --budget-ms 0.001: no measured prefill fits; the fastest, fastv at 0.5" in ran.err
    assert run(*QUICK, "--rounds", 6, "--strategies", "fastv", "--budget-ms", 1e6).code == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--model", "lisa-tyni"), ("lisa-tyni", "lisa-tiny")),
        (("--strategies", "fastw"), ("unknown strategy 'fastw'", "fastv")),
        (("--budget", "x"), ("budget: 'x' found",)),
        (("--layers", "2"), ("--layers has no effect without --model-shape",)),
        ((*SHAPE, "--model", "lisa-tiny"), ("--model has no effect with --model-shape",)),
        (("--model-shape", "8b"), ("unknown model shape '8b'",)),
        (("--model-shape", "7b", "--layers", "0"), ("--layers 0 found",)),
        (("--model-shape", "7b", "--dtype", "int8"), ("dtype 'int8' found",)),
        (("--image-tokens", "0"), ("image_tokens: 0 found",)),
        (("--image-tokens", "4000"), ("image_tokens: 4000 found", "give at most 2012")),
        (("--budget-ms", "-1"), ("budget_ms: -1.0 found",)),
        (("--out", "nowhere/found.json"), ("no folder 'nowhere'",)),
        (("--results", "nowhere"), ("nowhere",)),
    ],
)
def test_errors_are_one_line(run: Runner, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_line(run(*QUICK, *words), *parts)
