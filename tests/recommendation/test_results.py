"""What is concluded from times: what fits into milliseconds, and the tables."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenprune.errors import BudgetError
from tokenprune.evaluation.comparison.tables import as_text
from tokenprune.recommendation.results import (
    Accuracy,
    Advice,
    BreakEven,
    LeftOut,
    Recommendation,
    Times,
    Timing,
    fitting,
)

NAMES = ["csp", "visionzip+pyramiddrop", "fastv"]


def timing(name: str, tokens: int, ms: float, none_ms: float = 10.0, spread: float = 0.25, batch: int = 1) -> Timing:
    return Timing(
        strategy=name,
        budget=0.35,
        image_tokens=tokens,
        batch=batch,
        rounds=9,
        prefill=Times(median_ms=ms, min_ms=ms - spread, low_ms=ms - spread, high_ms=ms + spread),
        none=Times(median_ms=none_ms, min_ms=none_ms - 0.5, low_ms=none_ms - 0.5, high_ms=none_ms + 0.5),
        ratio=ms / none_ms,
        ratio_low=(ms - spread) / none_ms,
        ratio_high=(ms + spread) / none_ms,
        ratio_of_minima=(ms - spread) / (none_ms - 0.5),
    )


def recommendation(timings: list[Timing], budget_ms: float | None = None, **others: object) -> Recommendation:
    known = Accuracy(model="lisa-tiny", dataset="shapes", split="val", samples=200, giou=0.653, agreement=0.734)
    made = [
        Advice(
            strategy=name,
            budget=0.35,
            break_even=[BreakEven(batch=1, image_tokens=64, not_shown_at=[256])],
            accuracy=[known] if name == "fastv" else [],
        )
        for name in dict.fromkeys(one.strategy for one in timings)
    ]
    return Recommendation(
        **{
            "model": "my-model",
            "layers": 12,
            "hidden": 192,
            "text_tokens": 36,
            "seconds": 60,
            "rounds": 9,
            "budget_ms": budget_ms,
            "environment": {},
            "strategies": made,
            "timings": timings,
            "fits": fitting(timings, budget_ms),
            **others,
        }
    )


def test_times_are_milliseconds_with_an_interval_from_six_rounds_on() -> None:
    found = Times.of([0.004, 0.001, 0.003, 0.002, 0.006, 0.005])
    assert found == Times(median_ms=3.5, min_ms=1, low_ms=1, high_ms=6)
    assert Times.of([0.002] * 5) == Times(median_ms=2, min_ms=2)


@pytest.mark.parametrize(("high", "pays"), [(0.99, True), (1.0, False), (1.2, False), (None, False)])
def test_it_pays_only_if_the_whole_interval_is_below_1(high: float | None, pays: bool) -> None:
    one = Timing(strategy="fastv", image_tokens=64, batch=1, ratio=0.5, ratio_high=high)
    assert one.pays is pays
    assert one.model_dump()["pays"] is pays


MS = st.floats(1, 100)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([64, 256]), MS)), MS, MS)
def test_what_fits_is_what_certainly_does(rows: list[tuple[str, int, float]], none_ms: float, budget_ms: float) -> None:
    timings = [timing(name, tokens, ms, none_ms) for name, tokens, ms in rows]
    expected = sorted((ms, name, tokens) for name, tokens, ms in rows if ms + 0.25 <= budget_ms)
    if none_ms + 0.5 <= budget_ms:
        expected += [(none_ms, "none", tokens) for tokens in {tokens for _, tokens, _ in rows}]
    found = fitting(timings, budget_ms)
    assert sorted((fit.median_ms, fit.strategy, fit.image_tokens) for fit in found) == sorted(expected)
    assert [fit.median_ms for fit in found] == sorted(fit.median_ms for fit in found)
    assert fitting(timings, None) == []


def test_too_few_rounds_fit_nowhere() -> None:
    one = Timing(strategy="fastv", image_tokens=64, batch=1, prefill=Times(median_ms=1, min_ms=1))
    assert fitting([one], 1e6) == []


def test_milliseconds_that_nothing_fits_into_are_an_error_that_names_the_fastest() -> None:
    timings = [timing("csp", 64, 8.0), timing("fastv", 64, 6.0), timing("fastv", 256, 60.0)]
    recommendation(timings, 7.0).check_fits()
    recommendation(timings).check_fits()
    with pytest.raises(BudgetError) as error:
        recommendation(timings, 3.0).check_fits()
    assert str(error.value) == (
        "--budget-ms 3: no measured prefill fits; the fastest, fastv at 0.35 with 64 image tokens and batch 1, takes "
        "up to 6.25 ms; allow more milliseconds, or measure smaller budgets or fewer image tokens"
    )


def test_an_accuracy_is_shown_with_the_model_that_it_is_of() -> None:
    text = as_text(recommendation([timing("fastv", 64, 6.0)]).table())
    assert "0.653" in text
    assert "measured on lisa-tiny (shapes, val, 200 queries); yours may differ." in text
    own = recommendation([timing("fastv", 64, 6.0)], model="lisa-tiny")
    assert "measured on lisa-tiny (shapes, val, 200 queries)." in as_text(own.table())
    assert "yours" not in as_text(own.table())


def test_it_begins_with_what_it_comes_to() -> None:
    timings = [timing("fastv", 64, 6.0), timing("csp", 64, 8.0), timing("dart", 64, 12.0), timing("fastv", 256, 30.0)]
    lines = " ".join(as_text(recommendation(timings).table(), 200).split())
    assert lines.index("save time") < lines.index("pays from")
    assert (
        "64 image tokens, batch 1: 2 of 3 save time; of these fastv at 0.35 has the highest known gIoU (0.653)" in lines
    )
    assert "256 image tokens, batch 1: 0 of 1 save time." in lines


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_keep_every_name_and_number(width: int) -> None:
    timings = [timing(name, tokens, 6.0, batch=batch) for name in NAMES for tokens in (64, 256) for batch in (1, 8)]
    failed = timing("dart", 64, 1.0).model_copy(update={"reason": "it is too long", "ratio": None, "prefill": None})
    left = [LeftOut(image_tokens=4096, batch=1, reason="left out: it needs too long")]
    found = recommendation([*timings, failed], 100.0, left_out=left)
    text = as_text(found.table(), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    flat = " ".join(text.split())
    assert len(re.findall(r"0\.60 \(0\.57–0\.62\)", flat)) == len(timings)
    assert len(re.findall(r"\b6 \(5\.75\)", flat)) == len(timings)
    assert len(re.findall(r"10 \(9\.5\)", flat)) == 4
    for words in ("64 (not shown at 256)", "did not run: it is too long", "4096 image tokens, batch 1: left out"):
        assert words in flat
    assert str(found).split() == as_text(found.table()).split()
    assert Recommendation.model_validate_json(found.to_json()) == found
