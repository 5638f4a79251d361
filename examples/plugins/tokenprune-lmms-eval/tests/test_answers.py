"""lmms-eval's files as tables: read, summarised, and refused where they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenprune_lmms_eval.answers import answer_sets, read_logs, summarized
from tokenprune_lmms_eval.arguments import contender_of, own_arguments

import tokenprune as tp
from tokenprune.cli.app import main
from tokenprune.errors import InputError
from tokenprune.plugins import registry
from tokenprune.sweeps.answer_summary import summarised_answers

RECORD = {
    "strategy": "fastv",
    "label": "fastv at 0.35",
    "given": {},
    "budget": 0.35,
    "ran": "FastV(layer=1, keep=8)",
    "image_tokens": 64,
    "other_tokens": 30,
    "equivalent_tokens": 22.0,
    "layers": [64, 8, 8, 8],
    "flops": 5e6,
    "flops_by_part": {"decoder": 5e6},
    "flops_unpruned": 10_000_000,
    "kv_bytes": 51200.0,
}


def write_run(folder: Path, run: str, task: str = "vqa", changes: list[dict[str, Any] | None] | None = None) -> Path:
    """What lmms-eval writes for a task, each sample with a changed record, or without one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, change in enumerate([{}, {}] if changes is None else changes):
        counts: dict[str, Any] = {"output_tokens": 3}
        if change is not None:
            counts["tokenprune"] = {**RECORD, **change}
        sample = {"doc_id": number, "target": "yes", "filtered_resps": "no", "token_counts": [counts], "doc_hash": "0"}
        lines.append(json.dumps({**sample, "input": "Is it?", "exact_match": float(number)}))
    path = folder / f"{run}_samples_{task}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    scores = {"alias": task, "exact_match,none": 0.5, "exact_match_stderr,none": 0.25, "other,strict": 1}
    about: dict[str, Any] = {"results": {task: scores}, "model_name": "org/model", "lmms_eval_version": "v0.7.3@abc"}
    about |= {"configs": {task: {"test_split": "test"}}, "config": {"model": "tokenprune_llava_hf", "batch_size": 1}}
    about["higher_is_better"] = {task: {"exact_match": True, "other": False}}
    (folder / f"{run}_results.json").write_text(json.dumps(about))
    return path


def test_a_row_for_each_answer(tmp_path: Path) -> None:
    write_run(tmp_path / "org__model", "2026_1")
    table = read_logs(tmp_path)
    assert len(table) == 2
    row = table.iloc[1].to_dict()
    assert (row["model"], row["dataset"], row["protocol"]) == ("org/model", "vqa", "lmms-eval")
    assert row["run"] == str(tmp_path / "org__model" / "2026_1")
    assert (row["sample"], row["text"], row["answer"], row["target"]) == ("1", "Is it?", "no", "yes")
    assert row["metrics"] == {"exact_match": 1.0}
    assert {name: row[name] for name in RECORD} == {**RECORD, "given": "{}"}


def test_its_columns_are_those_of_a_sweep(tmp_path: Path) -> None:
    write_run(tmp_path / "logs", "2026_1")
    config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none"], "limit": 1}
    tp.sweep(config, tmp_path / "run")
    own = {"run", "answer", "target", "ran", "other_tokens", "flops_unpruned"}
    found, swept = read_logs(tmp_path / "logs"), tp.read_results(tmp_path / "run")
    assert set(found) - own <= set(swept)
    both = pd.concat([found, swept])
    assert both.groupby("label").equivalent_tokens.mean().to_dict() == {"fastv at 0.35": 22.0, "none": 256.0}
    for name in ("layers", "flops_by_part", "metrics", "given", "sample", "text"):
        assert type(found[name][0]) is type(swept[name][0]), name


def test_a_summary_has_lmms_evals_scores(tmp_path: Path) -> None:
    path = write_run(tmp_path, "2026_1", changes=[{}, {"equivalent_tokens": 20.0, "flops": 3e6}])
    none = {"label": "none", "strategy": "none", "equivalent_tokens": 64.0, "flops": 1e7}
    write_run(tmp_path, "2026_2", changes=[none, none])
    write_run(tmp_path, "2026_3", changes=[None, None])  # of a model without this plugin
    table = summarized(read_logs(tmp_path))
    assert [tuple(row) for row in table[["label", "metric", "score"]].itertuples(index=False)] == [
        ("fastv at 0.35", "exact_match", 0.5),
        ("fastv at 0.35", "other,strict", 1),
        ("none", "exact_match", 0.5),
        ("none", "other,strict", 1),
    ]
    first = table.iloc[0]
    assert (first.stderr, first.answers, first.image_tokens, first.equivalent_tokens) == (0.25, 2, 64, 21)
    assert first.flops == pytest.approx(0.4)
    assert table.iloc[2].flops == 1
    assert read_logs(path).label.unique().tolist() == ["fastv at 0.35"]


def test_flops_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    unknown = {"flops": None, "flops_unpruned": None, "flops_by_part": {}, "kv_bytes": None}
    write_run(tmp_path, "2026_1", changes=[unknown, unknown])
    assert summarized(read_logs(tmp_path)).flops.isna().all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [plugin.status for plugin in registry.plugins() if plugin.name == "lmms-eval"] == ["works"]
    write_run(tmp_path / "logs", "2026_1")
    with pytest.raises(SystemExit) as done:
        main(["lmms-eval", str(tmp_path / "logs"), "--out", str(tmp_path / "answers.csv")])
    assert not done.value.code
    assert "| vqa | fastv at 0.35 | exact_match | 0.5 | 0.25 | 2 | 64 | 22 | 0.5 |" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "answers.csv").answer.tolist() == ["no", "no"]


def test_answers_are_stored_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "logs", "2026_1")
    none = {"label": "none", "strategy": "none", "budget": None, "equivalent_tokens": 64.0, "flops": 1e7, "ran": None}
    write_run(tmp_path / "logs", "2026_2", changes=[none, none])
    for added in (4, 0):
        with pytest.raises(SystemExit) as done:
            main(["lmms-eval", str(tmp_path / "logs"), "--into", str(tmp_path / "run")])
        assert not done.value.code
        assert f"stored {added} new answers in {tmp_path / 'run'}" in capsys.readouterr().err
    stored, read = tp.read_answers(tmp_path / "run"), read_logs(tmp_path / "logs").iloc[[2, 3, 0, 1]]
    assert set(read) <= set(stored)
    for name in set(read) - {"run"}:
        values = [[None if value != value else value for value in table[name]] for table in (stored, read)]
        assert values[0] == values[1], name
    assert stored.run.tolist() == ["2026_2", "2026_2", "2026_1", "2026_1"]
    none_line, line = summarised_answers(tmp_path / "run")
    assert (line.model, line.dataset, line.split, line.protocol) == ("org/model", "vqa", "test", "lmms-eval")
    assert (line.answers, line.equivalent_tokens, line.flops_ratio) == (2, 22, 0.5)
    assert (none_line.tokens_ratio, none_line.flops_ratio) == (1, 1)
    found = line.scores["exact_match"]
    assert (found.estimate.value, found.stderr, found.higher_is_better) == (0.5, 0.25, True)
    assert (line.scores["other,strict"].stderr, line.scores["other,strict"].higher_is_better) == (None, False)
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"), "--tables", str(tmp_path)])
    assert not done.value.code
    assert "| fastv | 0.35 | 0.500 [0.010, 0.990] | 1.000 [–] |" in (tmp_path / "answers.md").read_text()


def test_what_lmms_eval_leaves_open(tmp_path: Path) -> None:
    """Answers by several filters, answers that are no text, and scores that are no number."""
    path = write_run(tmp_path, "2026_1", changes=[{}, {}])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    first = {**first, "exact_match": float("nan"), "box": {"pred": [0.1, float("inf")]}, "filtered_resps": ["a", "b"]}
    again = {**first, "filtered_resps": "by another filter"}
    path.write_text("".join(json.dumps(one) + "\n" for one in (first, second, again)))
    results = tmp_path / "2026_1_results.json"
    found = json.loads(results.read_text())
    found["results"]["vqa"].update({"failed,none": float("nan"), "exact_match_stderr,none": "N/A"})
    results.write_text(json.dumps(found))
    (one,) = answer_sets(tmp_path)
    assert [answer.answer for answer in one.answers] == ['["a", "b"]', "no"]
    assert one.answers[0].metrics == {"exact_match": None, "box": {"pred": [0.1, None]}}
    assert {metric: (score.value, score.stderr) for metric, score in one.scores.items()} == {
        "exact_match": (0.5, None),
        "other,strict": (1, None),
    }
    assert one.environment == {"lmms-eval": "v0.7.3@abc", "model": "tokenprune_llava_hf", "batch_size": 1}
    results.write_text(json.dumps({**found, "lmms_eval_version": "unknown@unknown", "config": {}}))
    assert answer_sets(tmp_path)[0].environment == {}


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "2026_1", changes=[{}, {"image_tokens": "many"}])
    with pytest.raises(tp.TokenPruneError, match=r"2026_1, vqa: answers.1.image_tokens: found 'many'"):
        answer_sets(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere': no such file or folder; give lmms-eval's --output_path"):
        read_logs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no samples with records of tokenprune; run lmms-eval with"):
        read_logs(tmp_path)
    write_run(tmp_path / "cached", "2026_1", changes=[{}, None])
    with pytest.raises(InputError, match=r"sample 1 has no record of tokenprune.*without --use_cache"):
        read_logs(tmp_path / "cached")
    write_run(tmp_path / "mixed", "2026_1", changes=[{}, {"label": "none"}])
    with pytest.raises(InputError, match=r"answers of several runs \(fastv at 0.35, none\)"):
        read_logs(tmp_path / "mixed")
    path = write_run(tmp_path / "cut", "2026_1")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="is not a file of lmms-eval"):
        read_logs(tmp_path / "cut")
    write_run(tmp_path / "gone", "2026_1")
    (tmp_path / "gone" / "2026_1_results.json").unlink()
    with pytest.raises(InputError, match=r"2026_1_results\.json cannot be read"):
        read_logs(tmp_path / "gone")


def test_arguments_are_read_as_on_the_command_line() -> None:
    class Model:
        def __init__(self, pretrained: str, device: str = "cpu", **kwargs: object) -> None: ...

    assert own_arguments(Model) == {"pretrained", "device"}
    contender = contender_of("csp", 0.35, {"query": "last", "clustering": "kmeans"}, set())
    assert contender.label == "csp (query=last, clustering=kmeans) at 0.35"
    assert contender_of("csp", None, {"clustering": "seg_first", "segmenter": "null"}, set()).given["segmenter"] is None
    with pytest.raises(tp.TokenPruneError, match=r"^model_args: .*'foo'.*the model itself takes device, pretrained$"):
        contender_of("fastv", 0.35, {"foo": 1}, {"pretrained", "device"})
