"""The models of this package in lmms-eval itself, on tiny random checkpoints and a local task."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; docs/lmms-eval.md says how")

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager
from PIL import Image
from tiny_vqa import write_llava, write_qwen, write_task
from tokenprune_lmms_eval.answers import read_logs, summarized
from tokenprune_lmms_eval.manifests import VARIABLE
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp
from tokenprune.errors import IncompatibleError, InputError, OptionError, UnknownNameError, UnsupportedError
from tokenprune.plugins import registry

PIXELS = {"min_pixels": 3136, "max_pixels": 448 * 448}
MODELS = ["llava_hf", "qwen2_5_vl", "qwen3_vl"]
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_llava(folder / "llava_hf")
    write_qwen(folder / "qwen2_5_vl", "2_5")
    write_qwen(folder / "qwen3_vl", "3")
    write_task(folder / "task")
    return folder


def evaluated(files: Path, model: str, more: str = "", *, task: str = "task", **options: Any) -> list[dict[str, Any]]:
    """The samples that lmms-eval collects."""
    wrapped = model.removeprefix("tokenprune_")
    given = [f"pretrained={files / wrapped}", "device_map=cpu", more]
    given += [f"{key}={value}" for key, value in PIXELS.items() if wrapped != "llava_hf"]
    manager = TaskManager("ERROR", include_path=str(files / task), include_defaults=False, model_name=model)
    results = simple_evaluate(
        model=model,
        model_args=",".join(filter(None, given)),
        tasks=["tiny_vqa"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
        **{"batch_size": 1, **options},
    )
    found: list[dict[str, Any]] = results["samples"]["tiny_vqa"]
    return found


def answers(samples: list[dict[str, Any]]) -> list[str]:
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2, 3]
    return [sample["filtered_resps"][0] for sample in samples]


def records(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample["token_counts"][0]["tokenprune"] for sample in samples]


@each_model
def test_lmms_eval_finds_the_models(name: str) -> None:
    manifest = get_model_manifest(f"tokenprune_{name}")
    assert issubclass(get_model(f"tokenprune_{name}"), get_model(name))
    assert manifest.model_id == f"tokenprune_{name}"
    assert issubclass(get_model(f"tokenprune_{name}", True), get_model(name, True))


@each_model
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_without_pruning_the_answers_are_those_of_lmms_eval(files: Path, name: str, simple: bool) -> None:
    untouched = evaluated(files, name, force_simple=simple)
    samples = evaluated(files, f"tokenprune_{name}", "strategy=none", force_simple=simple)
    assert answers(samples) == answers(untouched)
    for record in records(samples):
        assert record["strategy"] == record["label"] == "none"
        assert record["equivalent_tokens"] == record["image_tokens"] > 0
        assert record["flops"] == record["flops_unpruned"] > 0


@each_model
def test_under_a_strategy_the_answers_are_those_of_tokenprune(files: Path, name: str) -> None:
    samples = evaluated(files, f"tokenprune_{name}", "strategy=fastv,budget=0.6,layer=2,query=last")
    strategy = tp.strategy("fastv", budget=0.6, layer=2, query="last")
    expected, traces = by_hand(files, name, strategy)
    assert answers(samples) == expected
    assert expected != by_hand(files, name, tp.strategy("none"))[0]
    for record, trace in zip(records(samples), traces, strict=True):
        assert (record["image_tokens"],) == trace.ledger.image_tokens
        assert record["equivalent_tokens"] == trace.ledger.equivalent_tokens <= 0.6 * record["image_tokens"]
        assert record["layers"] == [entry.image[0] for entry in trace.ledger.entries]
        assert record["given"] == {"layer": 2, "query": "last"}
        assert (record["label"], record["budget"]) == ("fastv (layer=2, query=last) at 0.6", 0.6)
        assert record["ran"] == trace.strategy
        assert 0 < record["flops"] < record["flops_unpruned"]
        assert record["flops"] == sum(record["flops_by_part"].values())


def by_hand(files: Path, name: str, strategy: tp.Strategy) -> tuple[list[str], list[Any]]:
    """The answers of `generate` under tokenprune, with inputs that are made here, and the traces."""
    processor = AutoProcessor.from_pretrained(files / name, **({} if name == "llava_hf" else PIXELS))
    dtype = torch.float32 if name == "llava_hf" else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(files / name, dtype=dtype).eval()
    texts, traces = [], []
    for row in pd.read_parquet(files / "task/tiny.parquet").itertuples():
        picture = Image.open(io.BytesIO(row.image["bytes"])).convert("RGB")
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}]
        if name == "qwen3_vl":
            turns.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with tp.prune(model, strategy) as run:
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
        new = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(new, skip_special_tokens=True))
        traces.append(run.trace)
    return texts, traces


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_records_in_a_batch_are_those_of_each_alone(files: Path, name: str, simple: bool) -> None:
    """Rows of a batch are sorted by their prompts and padded; all prompts differ in length."""
    model, more = f"tokenprune_{name}", "strategy=similarity,budget=0.4"
    alone = records(evaluated(files, model, more, force_simple=simple))
    batched = records(evaluated(files, model, more, force_simple=simple, batch_size=3))
    assert len({record["flops"] for record in alone}) == 4
    assert without_ran(batched) == without_ran(alone)
    assert None in [record["ran"] for record in batched]  # options differ between rows


def test_beams_have_one_record(files: Path) -> None:
    model, more = "tokenprune_qwen2_5_vl", "strategy=uniform,budget=0.4"
    alone = records(evaluated(files, model, more))
    batched = records(evaluated(files, model, more, batch_size=2, gen_kwargs="num_beams=2,max_new_tokens=3"))
    assert without_ran(batched) == without_ran(alone)


def without_ran(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "ran"} for record in found]


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ("strategy=fastw,budget=0.3", UnknownNameError, "did you mean 'fastv'"),
        ("strategy=fastv,budget=0.3,layers=2", OptionError, "unknown option 'layers'.*itself takes .*max_pixels"),
        ("strategy=fastv,budget=0.3,layer=x", OptionError, "layer.*'x'"),
        ("strategy=fastv,budget=30", OptionError, "budget must be a share"),
        ("budget=0.3", OptionError, "'none' has nothing"),
        ("pretraind=x", OptionError, "unknown option 'pretraind'"),
    ],
)
def test_what_is_wrong_is_refused_before_weights_are_read(more: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as found:
        get_model("tokenprune_qwen2_5_vl").create_from_arg_string(f"pretrained=/nowhere,{more}")
    assert str(found.value).startswith("model_args: ")
    assert "\n" not in str(found.value)


def test_a_strategy_that_the_model_has_no_reads_for_is_refused_before_the_task(files: Path) -> None:
    with pytest.raises(IncompatibleError, match="fastervlm"):
        evaluated(files, "tokenprune_qwen2_5_vl", "strategy=fastervlm,budget=0.3", task="nowhere")


class Broken(tp.Strategy):
    """A strategy that fails in every prefill."""

    name = "broken"

    def stages(self, shape: tp.Shape) -> Any:
        yield tp.Stage("fail", layer=1, tokens=4)

    def choose(self, stage: tp.Stage, tokens: tp.Tokens) -> Any:
        raise ValueError("on purpose")


class BrokenPlugin:
    @tp.hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        register("broken", Broken)


@each_model
def test_a_failure_is_no_empty_answer(files: Path, name: str) -> None:
    """lmms-eval's `llava_hf` would log it, and go on with an empty text."""
    registry.register_plugin(BrokenPlugin(), name="broken")
    try:
        with pytest.raises(tp.TokenPruneError, match="on purpose"):
            evaluated(files, f"tokenprune_{name}", "strategy=broken")
    finally:
        registry.unregister_plugin("broken")


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_output_are_refused(files: Path, kind: str) -> None:
    write_task(files / kind, kind=kind)
    with pytest.raises(UnsupportedError, match=f"'tiny_vqa' is of output_type {kind}"):
        evaluated(files, "tokenprune_llava_hf", task=kind, force_simple=True)


@pytest.mark.parametrize("key", ["lmms_eval_specific_kwargs", "model_specific_generation_kwargs"])
def test_a_prompt_for_the_wrapped_model_alone_is_refused(files: Path, key: str) -> None:
    own = f"{key}: {{default: {{}}, qwen2_5_vl: {{max_new_tokens: 2}}}}\n"
    write_task(files / key, more=own)
    with pytest.raises(InputError, match=f"'tiny_vqa' has {key} for 'qwen2_5_vl'"):
        evaluated(files, "tokenprune_qwen2_5_vl", task=key)


def test_under_lmms_evals_own_name_a_prompt_is_that_of_the_wrapped_model(files: Path) -> None:
    """In another process, since the registry is made once."""
    key = "model_specific_generation_kwargs"
    write_task(files / "short", more=f"{key}: {{default: {{}}, qwen2_5_vl: {{max_new_tokens: 2}}}}\n")
    given = f"pretrained={files / 'qwen2_5_vl'},device_map=cpu,strategy=uniform,budget=0.5"
    words = ["--model", "qwen2_5_vl", "--model_args", given, "--tasks", "tiny_vqa", "--include_path", files / "short"]
    words += ["--device", "cpu", "--limit", "1", "--log_samples", "--output_path", files / "logs"]
    command = [sys.executable, "-m", "lmms_eval", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, VARIABLE: "1"}, capture_output=True, text=True)
    table = read_logs(files / "logs")
    assert table.label.tolist() == ["uniform at 0.5"], done.stderr
    (path,) = (files / "logs").rglob("*_samples_tiny_vqa.jsonl")
    (counts,) = json.loads(path.read_text())["token_counts"]
    assert counts["output_tokens"] <= 2
    (row,) = summarized(table).itertuples()
    assert (row.dataset, row.metric, row.score) == ("tiny_vqa", "exact_match", 0)
