"""Tables on narrow terminals, and rows of strategies that could not run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cli_fixtures import Runner, run
from fake_segmentation import FakeData, FakeModel, Front, Whole
from rich.console import Group

from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison, Row
from tokenprune.evaluation.comparison.tables import as_text
from tokenprune.plugins import registry
from tokenprune.utils.split_tables import Column, Parted

__all__ = ["run"]  # the fixture

NUMBERS = {"giou": 0.125, "ciou": 0.25, "agreement": 0.375, "equivalent_tokens": 1234.5, "kv_bytes": 5.75e6}
NUMBERS |= {"equivalent_tokens_ratio": 0.625, "flops": 4.25e9, "flops_ratio": 0.875, "prefill_ms": 1234.5}
NUMBERS |= {"prefill_speedup": 1.25, "target_coverage": 0.0625}
SHOWN = ("0.125", "0.250", "0.375", "1234.5 (0.625)", "4.25 G (0.875)", "5.75 MB", "1234.5 ms", "1.25×", "0.062")
NAMES = ["none", "csp", "visionzip+pyramiddrop", "prumerge+", "sparsevlm+"]


def wide_comparison(budgets: int) -> Comparison:
    """Every number there is, for the longest names."""
    given = {"clustering": "cls_attention", "reentry": "delta"}
    groups = {"giou_by_kind": {"attribute": 0.5, "reasoning": 0.75}, "miou_by_size": {"small": 0.1875, "large": 0.9375}}
    rows = [
        Row(strategy=name, options={}, given=given if name == "csp" else {}, budget=budget, **NUMBERS, **groups)
        for name in NAMES
        for budget in (0.35, 0.25)[:budgets]
    ]
    rows[0] = rows[0].model_copy(update={"metrics": {"boundary": 7.5}})
    return Comparison(
        model="lisa-tiny", dataset="shapes", split="val", samples=200, budget=0.35, environment={}, rows=rows
    )


def test_what_is_slower_than_no_pruning_is_warned_of_in_the_table_and_in_json() -> None:
    slow = {"prefill_ms": 12.0, "prefill_speedup": 0.75}
    rows = [
        Row(strategy="none", options={}, prefill_ms=9.0, prefill_speedup=1.0),
        Row(strategy="csp", options={}, budget=0.35, given={"query": "seg"}, **slow),
        Row(strategy="fastv", options={}, budget=0.35, prefill_ms=6.0, prefill_speedup=1.5),
        Row(strategy="dart", options={}, budget=0.35),
    ]
    found = Comparison(model="m", dataset="d", split="val", samples=1, budget=0.35, environment={}, rows=rows)
    words = "prefill is slower than without pruning: 12.0 ms against 9.0 ms"
    assert [row["prefill_warning"] for row in found.model_dump()["rows"]] == [None, words, None, None]
    text = as_text(found.table())
    assert f" warning: csp (query=seg) at 0.35: {words}" in text
    assert text.count("warning") == 1
    assert Comparison.model_validate_json(found.to_json()) == found


def test_strategies_that_renumber_positions_are_named_once() -> None:
    rows = [
        Row(strategy="csp", options={}, policies={"positions": "keep"}),
        Row(strategy="fastv", options={}, budget=0.5, policies={"positions": "renumber"}),
        Row(strategy="fastv", options={}, budget=0.35, policies={"positions": "renumber"}),
        Row(strategy="visionzip+csp", options={}, policies={"positions": "renumber, then keep"}),
        Row(strategy="fastv", options={}, given={"positions": "keep"}, policies={"positions": "keep"}),
    ]
    found = Comparison(model="m", dataset="d", split="val", samples=1, budget=0.35, environment={}, rows=rows)
    flagged = [row["positions_warning"] is not None for row in found.model_dump()["rows"]]
    assert flagged == [False, True, True, True, False]
    text = as_text(found.table(), 200)
    assert "note: fastv, visionzip+csp: renumbers positions, from which a model tells places" in text
    assert text.count("renumbers positions") == 1


@pytest.mark.parametrize("budgets", [1, 2])
@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 200])
def test_every_part_of_a_comparison_keeps_names_and_numbers(width: int, budgets: int) -> None:
    text = as_text(wide_comparison(budgets).table(), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    parts = re.split(r"\n(?=.*strategy)", text)[1:]
    assert len(parts) >= 3
    for part in parts:
        lines = [line.split()[0] for line in part.splitlines() if line.strip()]
        assert [line for line in lines if line in NAMES] == [name for name in NAMES for _ in range(budgets)]
    for shown in SHOWN:
        assert text.count(shown) == len(NAMES) * budgets, shown
    for option in ("(clustering=cls_attention,", "reentry=delta)"):
        assert option in text


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize("command", [("list",), ("list", "--plugins")])
def test_listings_keep_every_name(
    run: Runner, monkeypatch: pytest.MonkeyPatch, width: int, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    ran = run(*command)
    assert ran.code == 0
    assert all(len(line) <= width for line in ran.out.splitlines())
    assert "…" not in ran.out.replace("Gemma 3, …", "")
    first = {line.split()[0] for line in ran.out.splitlines() if line.strip()}
    wanted = {"strategies", "adapters", "fakes"} if "--plugins" in command else set(registry.strategies())
    assert wanted <= first
    if "--plugins" not in command:
        assert re.sub(r"\s+", "", "the image tokens that the query row attends to most in an early layer") in re.sub(
            r"\s+", "", ran.out
        )


@pytest.mark.parametrize("width", [40, 60])
def test_flops_keep_every_number(run: Runner, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    ran = run("flops", "--strategy", "fastv", "--budget", 0.35)
    assert ran.code == 0
    assert all(len(line) <= width for line in ran.out.splitlines())
    assert "…" not in ran.out
    assert ran.out.startswith("FastV(layer=2, keep=176)")
    for shown in ("image tokens", "text tokens", "scored rows", "FLOPs", "KV cache", "508 G", "2.60 T", "20.1 MB"):
        assert shown in ran.out


def test_names_wider_than_the_terminal_are_folded_not_cut() -> None:
    table = Parted("t", Column("strategy", ["q" * 50]), [([Column("x", ["0.123"])], "")])
    text = as_text(table, 30)
    assert "".join(re.findall("q+", text)) == "q" * 50
    assert "0.123" in text


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    table = Parted("[b]t", Column("[i]s", ["[red]x"]), [([Column("[u]c", ["[1]"])], "")])
    for width in (14, 80):
        text = as_text(Group(table), width)
        for shown in ("[b]t", "[i]s", "[red]x", "[u]c", "[1]"):
            assert shown in text


def test_what_could_not_run_is_a_line_with_its_reason() -> None:
    found = compare(FakeModel(), FakeData(), [Whole(), Front(layer=2, budget=0.1)], 0.1, limit=2, timing_samples=0)
    for width in (40, 120):
        text = as_text(found.table(), width)
        (line,) = [line for line in text.splitlines() if line.strip().startswith("front") and "–" in line][:1]
        assert "0." not in line.replace("(layer=2)", "")
        flat = re.sub(r"\s+", " ", text)
        assert f"front (layer=2) at 0.1 did not run: {found.rows[1].reason}" in flat
        assert "did not run" in str(found)


@pytest.mark.parametrize(
    ("strategies", "budgets"),
    [
        (["none", "front"], None),
        (["none", Front(budget=0.35)], None),
        (["none", "front:budget=0.5"], ["–", "0.5"]),
        (["front:keep=0.9"], None),  # refused, and says so
        (["front:keep=0.9,budget=none", "front"], ["–", "0.35"]),
        ([Front(keep=0.9)], ["–"]),
        ([Front(budget=0.5)], ["0.5"]),
    ],
)
def test_a_title_names_no_budget_that_a_row_did_not_run_at(
    run: Runner, strategies: list[Any], budgets: list[str] | None
) -> None:
    found = compare(
        FakeModel(), FakeData(), [*strategies, *({"none"} - set(strategies))], 0.35, limit=2, timing_samples=0
    )
    assert [row.budget for row in found.rows[: len(budgets or ())]] == [
        None if shown == "–" else float(shown) for shown in budgets or ()
    ]
    for width in (40, 120):
        flat = re.sub(r"\s+", " ", as_text(found.table(), width))
        assert ("budget 0.35" in flat) == (budgets is None)
        if width == 120 and budgets is not None:
            assert re.search(r"strategy +budget", flat)


def test_what_the_user_set_is_refused_where_it_passes_the_budget(run: Runner) -> None:
    found = compare(FakeModel(), FakeData(), ["front:keep=0.9", "front:keep=0.1"], 0.35, limit=2, timing_samples=0)
    refused, within = found.rows
    assert (refused.budget, refused.given) == (0.35, {"keep": 0.9})
    assert "cannot meet budget 0.35" in str(refused.reason)
    # 4 layers of 36 tokens: one whole, three with 3
    assert (within.budget, within.equivalent_tokens) == (0.35, (36 + 3 * 3) / 4)
