"""`tokenprune.compare` on a model of milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_segmentation import SIDE, FakeData, FakeModel, Front, Whole

import tokenprune as tp
from tokenprune.core.ledger import LayerEntry, Ledger, LookAhead
from tokenprune.cost import DecoderSpec, count_flops, flop_counter, kv_bytes
from tokenprune.errors import BudgetError, IncompatibleError, OptionError, UnknownNameError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.accounting import row_ledger
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.evaluation.comparison.timing import interleaved_medians

TOP = ["model", "dataset", "split", "samples", "budget", "environment", "rows"]
ROW = ["strategy", "options", "giou", "ciou", "giou_by_kind", "agreement", "equivalent_tokens"]
ROW += ["equivalent_tokens_ratio", "flops", "flops_ratio", "kv_bytes", "prefill_ms", "prefill_speedup"]
NAMES = ["none", "blind", "random", "fastv"]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(FakeModel(), FakeData(), NAMES, budget=0.5, limit=7, timing_samples=1, timing_rounds=1, records=2)


def test_json_has_the_promised_keys(comparison: Comparison) -> None:
    found = json.loads(comparison.to_json())
    assert list(found) == TOP
    for row in found["rows"]:
        assert set(ROW) <= set(row)
    assert found["samples"] == 7
    assert found["budget"] == 0.5
    assert (found["model"], found["dataset"], found["split"]) == ("fake", "rectangles", "val")
    assert {"torch", "transformers", "python", "cpu", "threads", "dtype", "platform"} <= set(found["environment"])
    assert Comparison.model_validate(found).model_dump() == comparison.model_dump()


def test_the_untouched_model_is_its_own_reference(comparison: Comparison) -> None:
    none = comparison.rows[0]
    assert none.agreement == pytest.approx(1.0, abs=1e-4)
    assert none.equivalent_tokens == SIDE**2
    assert (none.equivalent_tokens_ratio, none.flops_ratio, none.prefill_speedup) == (1.0, 1.0, 1.0)
    assert none.target_coverage == 1.0


def test_blind_sees_nothing_and_no_budget_is_exceeded(comparison: Comparison) -> None:
    _, blind, random, fastv = comparison.rows
    assert (blind.equivalent_tokens, blind.target_coverage, blind.budget) == (0.0, 0.0, None)
    for row in (random, fastv):
        assert row.budget == 0.5
        assert 0.45 < row.equivalent_tokens_ratio <= 0.5
        assert row.flops_ratio < 1
    assert {"layer", "keep"} <= set(fastv.options)  # what the budget was solved to
    assert "scorer" in fastv.flops_by_part
    assert "scorer" not in random.flops_by_part


def test_scores_equal_those_of_segmenting_one_query_at_a_time() -> None:
    model, strategy = FakeModel(), Front(keep=0.5)
    row = compare(model, FakeData(), [strategy], limit=5, timing_samples=0).rows[0]
    overlaps, kinds = [], []
    for scene in FakeData().scenes("val", 5, 0):
        for query in scene.queries:
            mask = model.segment(scene.image, [query.text], strategy).masks[0].numpy()
            overlaps.append(metrics.overlap(mask, query.mask))
            kinds.append(query.kind)
    assert row.giou == pytest.approx(metrics.giou(overlaps), abs=1e-6)
    assert row.ciou == pytest.approx(metrics.ciou(overlaps), abs=1e-6)
    assert row.giou_by_kind == pytest.approx(metrics.miou_by(kinds, overlaps), abs=1e-6)
    assert (row.prefill_ms, row.prefill_speedup) == (None, None)


def test_flops_and_cache_are_those_of_each_query_alone() -> None:
    model, strategy = FakeModel(), Front(keep=0.5)
    row = compare(model, FakeData(), [strategy], limit=4, timing_samples=1, timing_rounds=1).rows[0]
    counted, cached = [], []
    spec = DecoderSpec.from_config(model.decoder.config)
    for scene in FakeData().scenes("val", 4, 0):
        for query in scene.queries:
            with flop_counter() as counter:
                result = model.segment(scene.image, [query.text], strategy)
            with flop_counter() as tower:
                model.encode_image(scene.image)
            counted.append(counter.get_total_flops() - tower.get_total_flops())
            cached.append(kv_bytes(result.trace.ledger, spec, 4).total)
    assert row.flops == pytest.approx(np.mean(counted), rel=1e-3)
    assert row.kv_bytes == np.mean(cached)


def test_the_image_is_encoded_once_a_scene() -> None:
    model = FakeModel()
    compare(model, FakeData(), NAMES, budget=0.5, limit=6, timing_samples=2, timing_rounds=1)
    assert model.encoded == 3


def test_agreement_needs_no_row_of_the_untouched_model() -> None:
    alone = compare(FakeModel(), FakeData(), [Front(keep=0.3)], limit=4, timing_samples=0).rows[0]
    beside = compare(FakeModel(), FakeData(), [Whole(), Front(keep=0.3)], limit=4, timing_samples=0).rows[1]
    assert alone == beside


def test_same_seed_same_result_other_seed_another() -> None:
    first, again, other = (
        compare(FakeModel(), FakeData(), ["random"], budget=0.3, limit=4, seed=seed, timing_samples=0).rows[0]
        for seed in (0, 0, 5)
    )
    assert first == again
    assert first.giou != other.giou


def test_several_budgets_give_a_row_each_but_for_strategies_without_one() -> None:
    found = compare(FakeModel(), FakeData(), ["none", "blind", "random"], [0.5, 0.25], limit=2, timing_samples=0)
    assert [(row.strategy, row.budget) for row in found.rows] == [
        ("none", None),
        ("blind", None),
        ("random", 0.5),
        ("random", 0.25),
    ]
    assert found.budget == [0.5, 0.25]


def test_table_prints_every_row_at_any_width(comparison: Comparison) -> None:
    from tokenprune.evaluation.comparison.tables import as_text

    for width in (80, 100, 160):
        text = as_text(comparison.table(), width)
        assert all(name in text for name in NAMES)
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())
    assert "gIoU" in str(comparison)


def test_public_name() -> None:
    assert tp.compare is compare


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"budget": 1.5}, BudgetError, r"\(0, 1\], got 1\.5"),
        ({"budget": 0}, BudgetError, r"\(0, 1\]"),
        ({"budget": []}, BudgetError, "empty"),
        ({"limit": 0}, OptionError, "limit"),
        ({"seed": -1}, OptionError, "seed"),
        ({"split": "vall"}, UnknownNameError, "did you mean 'val'"),
        ({"dataset": "shape"}, UnknownNameError, "did you mean 'shapes'"),
        ({"strategies": ["fastvv"]}, UnknownNameError, "did you mean 'fastv'"),
        ({"strategies": ["fastv:kep=1"]}, OptionError, "did you mean 'keep'"),
        ({"strategies": []}, OptionError, "empty"),
        ({"strategies": ["fastv"], "budget": 0.01}, BudgetError, "cannot meet"),
        ({"strategies": ["prumerge"]}, IncompatibleError, "prumerge"),
    ],
)
def test_requests_that_cannot_be_met(change: dict[str, object], error: type[Exception], match: str) -> None:
    request = {"dataset": FakeData(), "strategies": ["none"], "limit": 2, "timing_samples": 0, **change}
    with pytest.raises(error, match=match):
        compare(FakeModel(), **request)  # type: ignore[arg-type]


def test_row_ledger_is_the_account_of_a_row_alone() -> None:
    entries = [LayerEntry(0, (4, 4), (3, 5), 9), LayerEntry(1, (2, 1), (3, 5), 7, 1)]
    alone = row_ledger(Ledger((4, 4), (3, 5), entries, 9), 0)
    assert alone == Ledger((4,), (3,), [LayerEntry(0, (4,), (3,), 7), LayerEntry(1, (2,), (3,), 5, 1)])
    spec = DecoderSpec.of(layers=2, hidden=8, intermediate=8, heads=2)
    ahead = LookAhead(keys=9, queries=1, scored=1, reused=7), LookAhead(keys=9, queries=9, values=9, scored=2)
    entries[1] = replace(entries[1], ahead=ahead)
    assert row_ledger(Ledger((4, 4), (3, 5), entries, 9), 0).entries[1].ahead == (
        LookAhead(keys=7, queries=1, scored=1, reused=5),
        LookAhead(keys=7, queries=7, values=7, scored=2),
    )
    assert count_flops(alone, spec).decoder < count_flops(Ledger((4,), (3,), entries[:], 9), spec).decoder


def test_row_ledger_has_what_the_caches_of_the_row_keep() -> None:
    entries = [LayerEntry(0, (4, 4), (3, 5), 9, cached=(2, 1)), LayerEntry(1, (2, 1), (3, 5), 6)]
    for row, kept in enumerate((2, 1)):
        assert [entry.in_cache for entry in row_ledger(Ledger((4, 4), (3, 5), entries, 9), row).entries] == [
            (kept,)
        ] * 2


def test_timing_is_interleaved_and_rotates_who_is_first() -> None:
    now, order = [0.0], []

    def contender(name: str, seconds: float) -> object:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    runs = [contender("a", 1.0), contender("b", 2.0), contender("c", 3.0)]
    found = interleaved_medians([runs, runs], rounds=2, clock=lambda: now[0])  # type: ignore[list-item]
    assert found == [1.0, 2.0, 3.0]
    assert "".join(order) == "abc" + "abcbca" + "abc" + "bcacab"


def test_timing_takes_medians_so_that_one_slow_run_does_not_show() -> None:
    now, durations = [0.0], iter([1.0, 1.0, 50.0, 1.0])

    def run() -> None:
        now[0] += next(durations)

    assert interleaved_medians([[run]], rounds=3, clock=lambda: now[0]) == [1.0]


@pytest.mark.slow
def test_a_real_model_with_every_built_in_method(golden: Callable[[str], Path]) -> None:
    folder = golden("lisa")
    model = tp.load(folder / "checkpoint", vision_tower=folder / "vision_tower")
    names = ["none", "blind", "random", "uniform", "csp", "fastv", "prumerge", "prumerge+"]
    found = tp.compare(model, "shapes", names, budget=0.5, limit=2, timing_samples=1, timing_rounds=1)
    assert [row.strategy for row in found.rows] == names
    assert found.rows[0].agreement == pytest.approx(1.0, abs=1e-4)
    for row in found.rows[2:]:
        assert 0.48 < row.equivalent_tokens_ratio <= 0.5
        assert row.flops < found.rows[0].flops
        assert row.agreement < 1.0


def test_random_choices_differ_from_scene_to_scene() -> None:
    kept = []
    model = FakeModel()
    plain = model.segment

    def watched(*args: object, **kwargs: object) -> object:
        result = plain(*args, **kwargs)
        if result.trace is not None and result.trace.stages:
            kept.append(tuple(result.trace.stages[0].kept[0]))
        return result

    model.segment = watched  # type: ignore[method-assign]
    compare(model, FakeData(), ["random"], limit=8, timing_samples=0)
    assert len(set(kept)) > 1
