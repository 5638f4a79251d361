"""A strategy that cannot run at a budget is a row with its reason; the others run as if it were not there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData, FakeModel, Front, Whole

from tokenprune.core.decisions import Decision
from tokenprune.core.stage import Shape, Stage
from tokenprune.errors import BudgetError, IncompatibleError, InputError, PluginError
from tokenprune.evaluation.comparison.compare import compare
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.plugins import registry
from tokenprune.plugins.hookspecs import hookimpl
from tokenprune.report.overlays import comparison_sheet
from tokenprune.report.plots import tradeoff

__all__ = ["run"]  # the fixture

REQUEST: dict[str, Any] = {"limit": 4, "timing_samples": 1, "timing_rounds": 1, "records": 1}


class Late(Front):
    """Runs on some scenes, then raises."""

    name = "late"

    def __init__(self, error: Exception, after: int, **options: Any) -> None:
        super().__init__(**options)
        self.error, self.left = error, after

    def reseeded(self, offset: int) -> Late:
        return self

    def choose(self, stage: Stage, tokens: Any) -> Decision:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().choose(stage, tokens)


def numbers(found: Comparison) -> list[dict[str, Any]]:
    """The rows that ran, without times, which differ from run to run."""
    rows = [row.model_dump() for row in found.rows if row.reason is None]
    return [{key: value for key, value in row.items() if not key.startswith("prefill")} for row in rows]


def test_others_run_as_if_what_cannot_run_were_not_there() -> None:
    names: list[Any] = ["fastv", "none", "prumerge", "random"]
    found = compare(FakeModel(), FakeData(), names, budget=[0.5, 0.01], **REQUEST)
    assert [(row.strategy, row.budget, row.reason is None) for row in found.rows] == [
        ("fastv", 0.5, True),
        ("fastv", 0.01, False),
        ("none", None, True),
        ("prumerge", 0.5, False),
        ("prumerge", 0.01, False),
        ("random", 0.5, True),
        ("random", 0.01, False),
    ]
    assert "cannot meet budget 0.01" in (found.rows[1].reason or "")
    assert "'prumerge' is incompatible with model 'LlamaModel'" in (found.rows[3].reason or "")
    alone = compare(FakeModel(), FakeData(), ["fastv", "none", "random"], budget=0.5, **REQUEST)
    assert numbers(found) == numbers(alone)
    assert all(row.prefill_ms is not None for row in found.rows if row.reason is None)


def test_a_row_that_did_not_run_has_every_key_and_no_number() -> None:
    both = compare(FakeModel(), FakeData(), ["none", "fastv:layer=2"], budget=0.01, **REQUEST)
    ran, failed = json.loads(both.to_json())["rows"]
    assert list(failed) == list(ran)
    assert ran["reason"] is None
    assert failed["reason"].startswith("strategy 'fastv' cannot meet budget 0.01")
    assert (failed["strategy"], failed["budget"], failed["given"]) == ("fastv", 0.01, {"layer": 2})
    assert failed["options"]["layer"] == 2
    left = {key for key, value in failed.items() if isinstance(value, float | int) and key != "budget"}
    assert left == {"failed"}
    assert failed["failed"] is False
    assert Comparison.model_validate_json(both.to_json()).model_dump() == both.model_dump()


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BudgetError("too small for this image"), "too small for this image"),
        (ValueError("a bug"), "strategy 'late', stage 'cut' raised ValueError: a bug"),
        (torch.OutOfMemoryError("2 GiB"), "OutOfMemoryError: 2 GiB"),
    ],
)
def test_what_stops_running_half_way_is_left_out_from_there(error: Exception, told: str, after: int) -> None:
    """Two scenes, one run to settle options, one to count, and the timed ones: it may fail in any of them."""
    late = Late(error, after, keep=0.5)
    found = compare(FakeModel(), FakeData(), [late, "none", "random"], budget=0.5, **REQUEST)
    assert [row.reason is None for row in found.rows] == [False, True, True]
    assert told in (found.rows[0].reason or "")
    assert found.rows[0].failed is not isinstance(error, BudgetError)
    assert numbers(found) == numbers(compare(FakeModel(), FakeData(), ["none", "random"], budget=0.5, **REQUEST))


def test_where_nothing_can_run_the_reason_is_the_error() -> None:
    with pytest.raises(BudgetError, match=r"'fastv' cannot meet budget 0\.01"):
        compare(FakeModel(), FakeData(), ["fastv"], budget=0.01, **REQUEST)
    with pytest.raises(IncompatibleError, match="prumerge"):
        compare(FakeModel(), FakeData(), ["prumerge", "prumerge+"], **REQUEST)
    with pytest.raises(PluginError, match="a bug"):
        compare(FakeModel(), FakeData(), [Late(ValueError("a bug"), 1)], **REQUEST)


def test_what_is_wrong_with_a_query_is_no_strategys_reason() -> None:
    class Refusing(FakeModel):
        def build_inputs(self, image: Any, queries: Any, *, is_sentence: Any = None) -> Any:
            raise InputError("query is empty")

    with pytest.raises(InputError, match="query is empty"):
        compare(Refusing(), FakeData(), ["none", "random"], **REQUEST)


def test_pictures_tell_what_did_not_run() -> None:
    strategies: list[Any] = [Whole(), Front(layer=2, budget=0.1), Front(budget=0.5)]
    found = compare(FakeModel(), FakeData(), strategies, **REQUEST)
    labels = [text.get_text() for text in tradeoff(found).axes[0].get_legend().get_texts()]
    assert labels == ["whole", "front", "front (layer=2) at 0.1: did not run"]
    (record,) = found.records
    drawn = [axis.get_ylabel().replace("\n", " ") for axis in comparison_sheet(record).axes if axis.get_ylabel()]
    assert drawn == ["whole", "front at 0.5"]


class Crashing(Front):
    """Has a bug."""

    name = "crashing"

    def choose(self, stage: Stage, tokens: Any) -> Decision:
        raise ValueError("a bug")


class CrashingPlugin:
    """Registers it."""

    @hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        register("crashing", Crashing)


def test_a_strategy_with_a_bug_fails_the_command_after_its_table(run: Runner) -> None:
    registry.register_plugin(CrashingPlugin(), "crashing")
    try:
        ran = run(
            *("compare", "--model", "fake", "--dataset", "rectangles", "--limit", 2, "--timing-samples", 0),
            *("--strategies", "none,crashing", "--budget", "0.5"),
        )
    finally:
        registry.unregister_plugin("crashing")
    assert ran.code == 1
    assert "'crashing', stage 'cut' raised ValueError: a bug" in " ".join(ran.out.split())


def test_the_command_writes_and_prints_the_rest(run: Runner, tmp_path: Path) -> None:
    fake = ("compare", "--model", "fake", "--dataset", "rectangles", "--limit", 2, "--timing-samples", 0)
    out = ("--budget", "0.5,0.01", "--out", tmp_path / "out")
    ran = run(*fake, "--strategies", "none,fastv,prumerge", *out)
    assert ran.code == 0, ran.err
    assert "fastv at 0.01 did not run: strategy 'fastv' cannot meet budget 0.01" in " ".join(ran.out.split())
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["reason"] is None for row in rows] == [True, True, False, False, False]
    assert (tmp_path / "out" / "overlay-0-red-thing.png").exists()
    assert_one_line(run(*fake, "--strategies", "fastv", "--budget", "0.01"), "cannot meet budget 0.01")


class Unstaged(Front):
    """Whose stages cannot be asked for."""

    name = "unstaged"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        raise KeyError("layers")


def test_a_strategy_that_fails_before_anything_runs_is_a_row_too() -> None:
    found = compare(FakeModel(), FakeData(), ["none", Unstaged()], **REQUEST)
    assert "'unstaged'" in (found.rows[1].reason or "")
    assert found.rows[0].giou is not None
