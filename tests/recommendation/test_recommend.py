"""`tokenprune.recommend` on decoders of milliseconds. Nothing is concluded from their times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_segmentation import FakeModel, FakePlugin
from lisa_checkpoints import write_lisa
from torch.nn import functional
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.core.trace import Trace
from tokenprune.cost import DecoderSpec
from tokenprune.errors import BudgetError, CheckpointError, IncompatibleError, InputError, OptionError, UnknownNameError
from tokenprune.evaluation.comparison.results import Comparison, Row
from tokenprune.plugins import registry
from tokenprune.recommendation.decoders import MeasuredDecoder, RandomModel, random_decoder
from tokenprune.recommendation.results import Recommendation
from tokenprune.testing.tiny_decoders import tiny_llama

SPEC = DecoderSpec.of(layers=6, hidden=32, intermediate=48, heads=4, kv_heads=2)
ACCURACY = {"model": "other", "dataset": "mine", "split": "test", "samples": 3, "giou": 0.5, "agreement": 0.25}


def quick(model: Any = None, strategies: Any = ("fastv", "uniform"), **options: Any) -> Recommendation:
    return tp.recommend(tiny_llama(layers=6) if model is None else model, strategies, **{"rounds": 1, **options})


def test_every_size_and_batch_is_timed_with_and_without_pruning() -> None:
    found = quick(image_tokens=[25, 10], batch=[1, 3], rounds=7, threads=1)
    assert found.rounds == 7
    sizes = {(one.strategy, one.image_tokens, one.batch) for one in found.timings}
    assert sizes == {(name, n, b) for name in ("fastv", "uniform") for n in (10, 25) for b in (1, 3)}
    for one in found.timings:
        assert one.rounds == 7
        assert one.none.min_ms <= one.none.median_ms <= one.none.high_ms
        assert one.ratio_low <= one.ratio <= one.ratio_high
        assert one.ratio_of_minima == pytest.approx(one.prefill.min_ms / one.none.min_ms)
        assert 0.1 < one.equivalent_tokens_ratio <= 0.35
    by_size = {(one.image_tokens, one.batch): one.none for one in found.timings}
    assert all(one.none == by_size[one.image_tokens, one.batch] for one in found.timings)
    assert found.environment["threads"] == 1
    assert {point.batch for row in found.strategies for point in row.break_even} == {1, 3}


def test_too_few_rounds_show_nothing() -> None:
    found = quick(image_tokens=16, rounds=2)
    assert all(one.ratio is not None and one.ratio_high is None and not one.pays for one in found.timings)
    assert all(point.image_tokens is None for row in found.strategies for point in row.break_even)


def test_a_strategy_that_cannot_run_has_its_reason_and_the_others_run() -> None:
    found = quick(strategies=["fastv", "prumerge", "fastv:layer=9,budget=none"], image_tokens=16)
    fastv, *others = found.strategies
    assert (fastv.reason, fastv.strategy) == (None, "fastv")
    reasons = {row.strategy: row.reason for row in others}
    assert "requires ReceivedAttention" in str(reasons["prumerge"])
    assert "option 'layer': found 9, but the model has 6 layers" in str(reasons["fastv"])
    assert "did not run" in str(found)


def test_each_reason_is_one_line_of_the_table_and_whole_in_the_result() -> None:
    names = ["fastv", "prumerge", "prumerge+", "csp:clustering=cls_attention", "fastv:layer=9,budget=none"]
    found = quick(strategies=names, image_tokens=16)
    lines = [line.strip() for line in str(found).splitlines() if "did not run" in line]
    assert len(lines) == 3
    assert all(len(line) < 120 for line in lines)
    assert lines[0].startswith("prumerge at 0.35, prumerge+ at 0.35 did not run: requires ReceivedAttention")
    assert "model provides" not in " ".join(lines)
    assert "fastv (layer=9) did not run: option 'layer': found 9, but the model has 6 layers" in lines
    assert all("; choose another strategy or another model" in str(row.reason) for row in found.strategies[1:3])


@pytest.mark.parametrize(
    ("make", "tokens"), [(lambda: tp.load("lisa-tiny"), 256), (lambda: tiny_llama(layers=2), None)]
)
def test_the_patches_of_a_models_tower_are_known(make: Any, tokens: int | None) -> None:
    assert MeasuredDecoder(make(), text_tokens=9).tower_tokens == tokens


def test_a_size_at_which_a_strategy_cannot_run_is_named() -> None:
    found = quick(image_tokens=[1, 64], strategies=["fastv"])
    small, large = found.timings
    assert small.reason is not None
    assert large.reason is None
    assert small.prefill is None
    assert "with 1 image tokens, batch 1 did not run" in " ".join(str(found).split())


def test_all_that_take_a_budget_are_measured_on_a_random_model() -> None:
    found = quick(RandomModel(SPEC, torch.float32, "cpu"), None, image_tokens=[36, 50], budget=0.5)
    ran = {row.strategy for row in found.strategies if row.reason is None}
    assert ran == {"random", "uniform", "csp", "csp+", "fastv", "prumerge", "prumerge+", "divprune", "similarity"} | {
        "tome",
        *("visionzip", "cdpruner", "litelvlm", "pyramiddrop", "sparsevlm", "sparsevlm+", "dart", "holov", "knorm"),
        *("vispruner", "fastervlm", "feather", "ivcprune", "vscan", "vitcop", "prunesid", "nuwa"),
    }
    assert not [one.reason for one in found.timings if one.reason]


def test_a_random_decoder_shares_one_layer_and_prunes_like_any_other() -> None:
    decoder: Any = random_decoder(SPEC)
    assert len({id(layer) for layer in decoder.layers}) == 6
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == list(range(6))
    assert sum(part.numel() for part in decoder.layers.parameters()) == sum(
        part.numel() for part in decoder.layers[0].parameters()
    )
    assert DecoderSpec.from_config(decoder.config, vocab=0) == SPEC.model_copy(update={"vocab": 0})
    embeds, marks = torch.randn(1, 24, 32), torch.zeros(1, 24, dtype=torch.bool)
    marks[:, 4:20] = True
    with torch.no_grad():
        full = decoder(inputs_embeds=embeds).last_hidden_state
        with tp.prune(decoder, tp.strategy("uniform", keep=1.0), image_tokens=marks):
            assert torch.equal(decoder(inputs_embeds=embeds).last_hidden_state, full)
        with tp.prune(decoder, tp.strategy("fastv", layer=2, keep=4), image_tokens=marks) as run:
            decoder(inputs_embeds=embeds)
    assert [entry.image[0] for entry in run.trace.ledger.entries] == [16, 16, 4, 4, 4, 4]


@pytest.mark.parametrize("tokens", [1, 7, 16, 50])
def test_a_cell_runs_prompts_of_that_many_image_tokens(tokens: int) -> None:
    measured = MeasuredDecoder(tiny_llama(layers=4), text_tokens=9)
    traces: dict[int, Trace] = {}
    cell = measured.cell(tokens, 2, {3: tp.strategy("uniform", keep=1.0)}, traces)
    with torch.no_grad():
        cell.contenders[3]()
    layout = traces[3].layout
    assert layout.image_tokens.sum(1).tolist() == [tokens] * 2
    assert layout.image_tokens.shape == (2, tokens + 9)
    assert functional.pad(layout.image_tokens, (0, 0))[:, :4].sum() == 0


def test_the_models_of_load_are_measured(tmp_path: Path) -> None:
    found = quick(write_lisa(tmp_path), ["csp:query=seg", "prumerge+"], image_tokens=16, budget=0.75)
    assert [row.reason for row in found.strategies] == [None, None]
    assert found.model == str(tmp_path)


def test_a_name_that_is_given_finds_the_models_own_accuracy() -> None:
    found = quick(strategies="fastv", image_tokens=16, name="lisa-tiny")
    assert found.model == found.strategies[0].accuracy[0].model == "lisa-tiny"
    quick(strategies="fastv", image_tokens=16, name="a \udcff b").to_json()  # as in a folder's name


def test_accuracies_of_bundled_results_are_those_of_the_docs() -> None:
    stored = json.loads((Path(__file__).parents[2] / "docs" / "results" / "sweep.json").read_text())
    row = next(one for one in stored["rows"] if (one["strategy"], one["budget"], one["given"]) == ("fastv", 0.5, {}))
    found = quick(budget=0.5, strategies="fastv", image_tokens=16).strategies[0].accuracy
    assert [(one.model, one.dataset, one.samples) for one in found] == [("lisa-tiny", "shapes", stored["queries"])]
    assert (found[0].giou, found[0].agreement) == (row["giou"][0], row["agreement"])
    assert quick(budget=0.3, strategies="fastv", image_tokens=16).strategies[0].accuracy == []
    assert quick(strategies="fastv:layer=1", image_tokens=16).strategies[0].accuracy[0].giou != row["giou"][0]


def test_accuracies_of_a_comparison_of_ones_own(tmp_path: Path) -> None:
    row = Row(strategy="fastv", options={}, budget=0.35, giou=0.5, agreement=0.25)
    failed = Row(strategy="uniform", options={}, budget=0.35, reason="no")
    kept = Comparison(
        model="other", dataset="mine", split="test", samples=3, budget=0.35, environment={}, rows=[row, failed]
    )
    (tmp_path / "results.json").write_text(kept.to_json())
    for place in (tmp_path, tmp_path / "results.json"):
        found = {row.strategy: row.accuracy for row in quick(results=place, image_tokens=16).strategies}
        assert [one.model_dump() for one in found["fastv"]] == [ACCURACY]
        assert found["uniform"] == []


@pytest.fixture
def _fakes(tmp_path: Path) -> Iterator[None]:
    folder = tmp_path / "fake-model"
    folder.mkdir()
    registry.register_plugin(FakePlugin(folder), "fakes")
    yield
    registry.unregister_plugin("fakes")


@pytest.mark.usefixtures("_fakes")
def test_accuracies_of_a_sweep(tmp_path: Path) -> None:
    config = {"models": "fake", "datasets": "rectangles", "strategies": ["none", "fastv"], "limit": 4}
    tp.sweep(config, tmp_path / "run")
    table = tp.read_results(tmp_path / "run")
    own = table[table.strategy == "fastv"]
    (known,) = quick(FakeModel().decoder, "fastv", results=tmp_path / "run", image_tokens=16).strategies[0].accuracy
    assert known.model_dump(include={"model", "dataset", "split", "samples"}) == {
        **{"model": "fake", "dataset": "rectangles", "split": "val", "samples": 4}
    }
    assert known.giou == pytest.approx(own.iou.mean())


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"model": "lisa-tyni"}, CheckpointError, "lisa-tiny"),
        ({"model": 3}, tp.TokenPruneError, "3"),
        ({"strategies": "fastw"}, UnknownNameError, "did you mean 'fastv'"),
        ({"strategies": ["prumerge"]}, IncompatibleError, "requires ReceivedAttention"),
        ({"strategies": "fastv", "image_tokens": 1}, OptionError, "strategies: none could run; strategy 'fastv'"),
        ({"image_tokens": 0}, OptionError, "image_tokens: 0 found, expected a whole number of at least 1"),
        ({"image_tokens": []}, OptionError, "image_tokens: an empty list found"),
        (
            {"image_tokens": [16, 2013]},
            OptionError,
            "image_tokens: 2013 found, but LlamaForCausalLM takes prompts of 2048 tokens, 36 of them text; give at "
            "most 2012",
        ),
        ({"batch": -1}, OptionError, "batch: -1 found"),
        ({"budget": 2}, BudgetError, "budget"),
        ({"budget_ms": 0}, OptionError, "budget_ms: 0 found, expected a number above 0"),
        ({"seconds": float("nan")}, OptionError, "seconds: nan found"),
        ({"seconds": 1e-9}, OptionError, "seconds: 1e-09 found, but 64 image tokens at batch 1 alone need about 1 s"),
        ({"rounds": 0}, OptionError, "rounds: 0 found"),
        ({"text_tokens": 0}, OptionError, "text_tokens: 0 found"),
        ({"progress": 3}, OptionError, "progress=3 found"),
        ({"results": "nowhere"}, InputError, "nowhere"),
    ],
)
def test_errors_name_thing_problem_and_cure(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        quick(**{"image_tokens": 64, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_results_that_are_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="are not those of a comparison"):
        quick(results=tmp_path)


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_transformers_own_models_are_measured(tmp_path: Path, family: str) -> None:
    found = quick(write_vlm(tmp_path, family), ["uniform", "csp"], budget=0.75, image_tokens=16)
    assert [row.reason for row in found.strategies] == [None, None]
