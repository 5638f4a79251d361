"""`tokenprune flops` and the reading of `key=value` options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenprune.cli.app import main
from tokenprune.core.by_name import parse_options
from tokenprune.errors import OptionError

SMALL = ["--layers", "4", "--hidden", "32", "--intermediate", "64", "--heads", "4"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["flops", *arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--format", "json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_fastv_on_7b_gives_the_published_figure(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model-shape", "7b", "--image-tokens", "576", "--text-tokens", "36", "--convention", "fastv"]
    found = run_json(capsys, *options, "--strategy", "fastv", "-o", "layer=3", "-o", "keep=0.25")
    assert found["flops_per_layer"] / 1e9 == pytest.approx(34.8, rel=0.013)
    assert [(s["first_layer"], s["last_layer"], s["image_tokens"]) for s in found["stages"]] == [
        (0, 2, 576),
        (3, 31, 144),
    ]
    assert found["options"]["layer"] == 3
    assert found["layers"][2]["scored_rows"] == 1


def test_budget_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "--strategy", "fastv", "--budget", "0.35")
    assert 0.34 < found["equivalent_tokens_ratio"] <= 0.35
    assert found["flops_ratio"] < 0.45
    assert found["budget"] == 0.35


def test_parts_and_stages_sum_to_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, *SMALL, "--vocab", "50", "--strategy", "fastv", "--image-tokens", "16")
    assert sum(found["flops_parts"].values()) == found["flops"]
    assert sum(stage["flops"] for stage in found["stages"]) == found["flops_parts"]["decoder"]
    assert sum(layer["kv_bytes"] for layer in found["layers"]) == found["kv_bytes"]
    assert found["flops_parts"]["lm_head"] == 2 * 32 * 50
    assert found["flops_parts"]["scorer"] > 0


def test_none_saves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys)
    assert found["flops_ratio"] == found["kv_bytes_ratio"] == found["equivalent_tokens_ratio"] == 1.0
    assert found["sizes"]["hidden"] == 4096


def test_table_shows_stages_and_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--strategy", "fastv", "-o", "keep=0.5")
    assert code == 0
    for text in ("0–1", "2–31", "288", "equivalent tokens", "unpruned, convention exact"):
        assert text in out


def test_config_file_or_folder_gives_the_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "anything", "text_config": text}))
    by_folder = run_json(capsys, "--model-shape", str(tmp_path))
    assert by_folder == run_json(capsys, "--model-shape", str(tmp_path / "config.json"))
    assert by_folder["sizes"]["kv_heads"] == 2
    assert by_folder["flops"] == run_json(capsys, *SMALL, "--kv-heads", "2")["flops"]
    assert run_json(capsys, "--model-shape", str(tmp_path), "--layers", "2")["sizes"]["layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "fastvv"], "did you mean 'fastv'"),
        (["--strategy", "fastv", "-o", "kep=0.5"], "did you mean 'keep'"),
        (["--strategy", "fastv", "-o", "keep=-1"], "'keep'"),
        (["--strategy", "fastv", "-o", "keep"], "expected key=value"),
        (["--strategy", "fastv", "--budget", "1.5"], "(0, 1], got 1.5"),
        (["--strategy", "fastv", "-o", "layer=9", *SMALL], "layers"),
        (["--model-shape", "8b"], "unknown model shape '8b'"),
        (["--model-shape", "/no/config.json"], "no such file"),
        (["--layers", "4"], "hidden, intermediate, heads missing"),
        (["--hidden", "4097", "--model-shape", "7b"], "does not divide into 32 heads"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_broken_config_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, message in (("{", "cannot be read as JSON"), ("[]", "found list"), ("{}", "missing")):
        path.write_text(text)
        code, _, err = run(capsys, "--model-shape", str(path))
        assert code == 2
        assert message in err


def test_options_are_read_as_they_look() -> None:
    given = ["layer=3", "keep=0.25", "clustering=kmeans", "faithful=true", "segmenter=null", 'name="7"', "x=a=b", "y="]
    read = {"layer": 3, "keep": 0.25, "clustering": "kmeans", "faithful": True, "segmenter": None, "name": "7"}
    assert parse_options(given) == {**read, "x": "a=b", "y": ""}
    assert parse_options(["scatter-at=NaN"]) == {"scatter_at": "NaN"}


@pytest.mark.parametrize("text", ["keep", "=1", "a b=1", ""])
def test_options_without_key_or_value_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="expected key=value"):
        parse_options([text])


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="'keep' is given twice"):
        parse_options(["keep=1", "keep=2"])
