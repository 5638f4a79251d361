"""Tuning: what is searched, that the best is found and confirmed on other queries, and how it goes on."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData, FakePlugin, Front

import tokenprune as tp
from tokenprune import hookimpl
from tokenprune.core.options import Amount, Depth
from tokenprune.datasets.base import Scene
from tokenprune.errors import BudgetError, InputError, OptionError, TokenPruneError
from tokenprune.plugins import registry
from tokenprune.sweeps import fingerprint
from tokenprune.sweeps.store import reading
from tokenprune.sweeps.tuning import Phase, tune
from tokenprune.sweeps.tuning.search_space import Choices, Range, derived
from tokenprune.sweeps.tuning.search_text import parse_search
from tokenprune.sweeps.tuning.tuned import FILE, Tuned

__all__ = ["run"]  # the fixture

SHAPE = tp.Shape(layers=12, image_tokens=256, text_tokens=30)


class Known(tp.Strategy):
    """Drops tokens at a layer, from the end, the beginning or both sides; one combination is refused."""

    name = "known"
    budget_option = "keep"

    class Options(tp.StrategyOptions):
        """Options of `known`."""

        keep: float = 0.5
        mode: Literal["worst", "bad", "best"] = "worst"
        layer: int = 1
        note: str | None = None

    def stages(self, shape: tp.Shape) -> Iterator[tp.Stage]:
        """One stage."""
        if self.options.mode == "bad" and self.options.layer == 2:
            raise OptionError("strategy 'known': bad at 2 is refused")
        yield tp.Stage("cut", self.options.layer, tokens=int(shape.image_tokens * self.options.keep + 1e-6))

    def choose(self, stage: tp.Stage, tokens: tp.Tokens) -> tp.Keep:
        """Tokens in the middle, at the end, or at the beginning."""
        size = tokens.exists.shape[1]
        place = torch.arange(size).float()
        scores = {"best": -(place - size / 2).abs(), "bad": place, "worst": -place}[self.options.mode]
        return tp.Keep.top(scores.expand_as(tokens.exists), tokens.target)


class Counted(FakeData):
    """Counts the scenes that are asked for, by split."""

    name = "counted"
    asked: dict[str, int] = {}  # noqa: RUF012 - of all instances
    same = False

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        """See `Dataset.scenes`."""
        for scene in super().scenes("val" if self.same else split, limit, seed):
            self.asked[split] = self.asked.get(split, 0) + 1
            yield scene


class Plugin(FakePlugin):
    """The fake model, and what is above."""

    @hookimpl
    def tokenprune_register_strategies(self, register: Any) -> None:
        """`known`."""
        register("known", Known)
        register("front", Front)

    @hookimpl
    def tokenprune_register_datasets(self, register: Any) -> None:
        """`counted`."""
        register("counted", Counted)


@pytest.fixture(autouse=True)
def _plugin(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    if "run" in request.fixturenames:
        yield
        return
    registry.register_plugin(Plugin(tmp_path_factory.mktemp("model")), "known-best")
    Counted.asked.clear()
    yield
    registry.unregister_plugin("known-best")


def tuned(out: Path, strategy: str = "known", **given: Any) -> Tuned:
    """A tuning on the fake model."""
    about: dict[str, Any] = {"model": "fake", "dataset": "counted", "budget": 0.6, "limit": 4, "confirm_limit": 6}
    return tune(strategy, out, **{**about, "trials": 20, **given})


# the search ----------------------------------------------------------------------------------------------------------


def test_the_best_is_found_and_confirmed(tmp_path: Path) -> None:
    found = tuned(tmp_path)
    every = {}
    for mode in ("worst", "bad", "best"):
        for layer in range(4):
            name = f"known:mode={mode},layer={layer}"
            config = {"models": "fake", "datasets": {"name": "counted", "split": "train"}, "strategies": name}
            tp.sweep({**config, "budgets": 0.6, "limit": 4}, tmp_path / name)
            table = tp.read_results(tmp_path / name)
            if len(table):
                every[mode, layer] = table.iou.mean()
    assert found.counts == {
        "combinations": 12,
        "asked": 12,
        "ran": len(every),
        "repeated": 0,
        "refused": 12 - len(every),
    }
    best = found.search.trials[found.search.best(1)[0]]
    assert best.giou == pytest.approx(max(every.values()))
    searched = {(one.options["mode"], one.options["layer"]): one.giou for one in found.search.trials if one.giou}
    assert searched == pytest.approx({key: value for key, value in every.items() if value})
    assert [row.name for row in found.rows] == ["untouched", "default", "tuned 1", "tuned 2", "tuned 3"]
    assert [row.calibration for row in found.rows[2:]] == sorted(
        (row.calibration for row in found.rows[2:]), reverse=True
    )


def test_the_confirmation_is_that_of_a_sweep(tmp_path: Path) -> None:
    found = tuned(tmp_path / "tuned")
    for row in found.rows[1:]:
        text = ",".join(f"{key}={value}" for key, value in row.given.items())
        config = {"models": "fake", "datasets": "counted", "strategies": f"known:{text}" if text else "known"}
        tp.sweep({**config, "budgets": 0.6, "limit": 6}, tmp_path / row.name)
        table = tp.read_results(tmp_path / row.name)
        assert row.giou is not None
        assert row.giou.low <= row.giou.value <= row.giou.high
        assert row.giou.value == pytest.approx(table.iou.mean())
        assert row.queries == len(table) == 6
        assert row.equivalent_tokens == pytest.approx(table.equivalent_tokens.mean())
        assert row.tokens_ratio is not None
        assert row.tokens_ratio <= 0.6
        default = found.rows[1].giou
        assert default is not None
        assert (row.difference is None) == (row.name == "default")
        if row.difference is not None:
            assert row.difference.value == pytest.approx(row.giou.value - default.value)


def test_tpe_finds_it_too(tmp_path: Path) -> None:
    whole, sampled = tuned(tmp_path / "whole"), tuned(tmp_path / "sampled", trials=8)
    assert sampled.counts["ran"] == 8
    assert sampled.counts["asked"] == 8 + sampled.counts["repeated"] + sampled.counts["refused"]
    values = sorted((outcome.giou for outcome in whole.search.ran.values()), reverse=True)
    assert max(outcome.giou for outcome in sampled.search.ran.values()) >= values[2]


def test_the_search_never_asks_for_the_other_split(tmp_path: Path) -> None:
    seen = []

    def progress(now: Phase) -> None:
        seen.append((now.name, Counted.asked.get("val", 0)))

    tuned(tmp_path, progress=progress)
    assert {asked for name, asked in seen if name == "search"} == {0}
    assert max(asked for name, asked in seen if name == "confirm") > 0
    with reading(tmp_path) as store:
        rows = store.rows(
            "SELECT split, COUNT(DISTINCT c.hash), COUNT(*) FROM records r JOIN configurations c "
            "ON c.hash = r.configuration GROUP BY split"
        )
        counts = {split: (configurations, records) for split, configurations, records in rows}
    assert counts["val"] == (5, 30)
    assert counts["train"][1] == counts["train"][0] * 4


def test_refused_combinations_are_counted(tmp_path: Path) -> None:
    found = tuned(tmp_path)
    refused = [trial for trial in found.search.trials if trial.options == {"mode": "bad", "layer": 2}]
    assert [trial.reason for trial in refused] == ["strategy 'known': bad at 2 is refused"]
    stored = json.loads((tmp_path / FILE).read_text())
    assert sum(one["count"] for one in stored["refused"]) == stored["counts"]["refused"] == found.counts["refused"]
    assert len(stored["searched"]) == found.counts["asked"]
    assert stored["finding"] == found.finding


def test_nothing_can_run(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"none of 3 combinations could run: strategy 'known' cannot meet budget"):
        tuned(tmp_path, budget=0.01, options={"layer": 3})


# going on ------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised by a test in the middle of a tuning."""


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_it_goes_on_with_the_same_trials(tmp_path: Path, after: int) -> None:
    calls = iter(range(after))

    def progress(now: Phase) -> None:
        if next(calls, None) is None:
            raise Stopped

    whole = tuned(tmp_path / "whole", trials=8)
    with pytest.raises(Stopped):
        tuned(tmp_path / "part", trials=8, progress=progress)
    assert not (tmp_path / "part" / FILE).exists()
    again = tuned(tmp_path / "part", trials=8)
    assert again.search.trials == whole.search.trials
    assert again.rows == whole.rows
    assert (tmp_path / "part" / FILE).read_text() == (tmp_path / "whole" / FILE).read_text()
    with reading(tmp_path / "part") as part, reading(tmp_path / "whole") as all_:
        assert part.count() == all_.count()


def test_what_is_stored_does_not_run_again(tmp_path: Path) -> None:
    query = "SELECT configuration, scene, query, milliseconds FROM records"
    stored = []
    for _ in range(2):
        tuned(tmp_path, trials=5)
        with reading(tmp_path) as store:
            stored.append(list(store.rows(query)))
    assert stored[0] == stored[1]


def test_it_grows(tmp_path: Path) -> None:
    small, more = tuned(tmp_path, trials=5), tuned(tmp_path, trials=8)
    assert more.search.trials[: len(small.search.trials)] == small.search.trials
    assert more.counts["ran"] == 8
    again = tuned(tmp_path, trials=5)
    assert (again.search.trials, again.rows) == (small.search.trials, small.rows)
    assert tuned(tmp_path, trials=5, limit=6, confirm_limit=8).rows[0].queries == 8


def test_a_folder_is_for_one_search(tmp_path: Path) -> None:
    tuned(tmp_path / "a", trials=2)
    with pytest.raises(InputError, match=r"holds a search with budget 0\.6, not 0\.7; give another folder"):
        tuned(tmp_path / "a", trials=2, budget=0.7)
    with pytest.raises(InputError, match="holds a search with seed 0, not 1"):
        tuned(tmp_path / "a", trials=2, seed=1)
    tp.sweep({"models": "fake", "datasets": "counted", "strategies": "none", "limit": 2}, tmp_path / "b")
    with pytest.raises(InputError, match="holds a sweep; give another folder"):
        tuned(tmp_path / "b")


def test_changes_since_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path, trials=2)
    monkeypatch.setattr(fingerprint, "of_code", lambda strategies: "other")
    with pytest.raises(InputError, match="the code changed since"):
        tuned(tmp_path, trials=4)
    tuned(tmp_path, trials=4, accept_changes=True)


# what is refused -----------------------------------------------------------------------------------------------------


def test_splits_with_common_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "same", True)
    with pytest.raises(InputError, match="has an image that is also in split 'train', so it confirms nothing"):
        tuned(tmp_path, trials=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "none"}, "has nothing that a budget could move"),
        ({"strategy": "uniform+fastv"}, "is a composition, which has no search space"),
        (
            {"strategy": "uniform", "options": {"positions": "keep"}},
            r"has no option to search \(keep: the budget moves it; ",
        ),
        ({"strategy": "unifrom"}, "did you mean 'uniform'"),
        ({"strategy": "known:budget=0.3"}, "a budget found among its options"),
        ({"strategy": "known:layer=2", "options": {"layer": 1}}, "option 'layer' is given twice"),
        ({"options": {"keep": 0.2}}, "option 'keep' is what the budget moves"),
        ({"search_for": ["keep=0.1..0.3"]}, "option 'keep' is what the budget moves"),
        ({"search_for": ["layer=1..2"], "options": {"layer": 1}}, "is fixed .* and searched"),
        ({"confirm_split": "train"}, "both splits are 'train'"),
        ({"split": "test"}, "unknown split of dataset 'counted' 'test'"),
        ({"trials": 0}, "trials"),
        ({"limit": 0}, "limit"),
        ({"budget": 1.5}, "budget must be a share"),
    ],
)
def test_mistakes(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenPruneError, match=message) as told:
        tuned(tmp_path, **given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer", "expected key=lo..hi"),
        ("=1..2", "expected key=lo..hi"),
        ("layer=", "expected key=lo..hi"),
        ("layer=5..1", "found a range from 5 to 1"),
        ("layer=a..b", "a range is of numbers"),
        ("layer=1", "at least two different values"),
        ("layer=1,1", "at least two different values"),
        ("layr=1..2", "did you mean 'layer'"),
        ("layer=0.5..2", "option 'layer'"),
        ("mode=best,good", "option 'mode'"),
    ],
)
def test_texts_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as told:
        parse_search(Known(), [text])
    assert str(told.value).startswith("--search")
    assert "\n" not in str(told.value)


def test_texts() -> None:
    assert parse_search(Known(), ["layer=1..3", "mode=bad, best"]) == {
        "layer": Range(1, 3),
        "mode": Choices(("bad", "best")),
    }
    assert parse_search(Known(), ["keep=.1..1"]) == {"keep": Range(0.1, 1.0)}
    layers = parse_search(tp.strategy("pyramiddrop"), ["layers=[1,3],[2,4]"])
    assert layers == {"layers": Choices(([1, 3], [2, 4]))}
    with pytest.raises(OptionError, match="is given twice"):
        parse_search(Known(), ["layer=1..3", "layer=1,2"])


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'optuna.*is not installed.*pip install "tokenprune-vlm\[tune\]"'):
        tuned(tmp_path)


# the space -----------------------------------------------------------------------------------------------------------


BUILT_IN = sorted(name for name, entry in tp.strategies().items() if entry.distribution == "tokenprune-vlm")
NOTHING = {
    "none": "nothing that a budget could move",
    "blind": "nothing that a budget could move",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_builtin_strategy_has_a_space_or_says_why_not(name: str) -> None:
    plain = tp.strategy(name)
    if name in NOTHING:
        with pytest.raises(TokenPruneError, match=NOTHING[name]):
            derived(plain, 0.35, SHAPE)
        return
    space = derived(plain, 0.35, SHAPE)
    assert space.domains.keys() | space.left_out.keys() == plain.Options.model_fields.keys()
    assert not space.domains.keys() & space.left_out.keys()
    for option, domain in space.domains.items():
        assert len(domain.values) > 1
        for value in domain.values:
            plain.Options(**{option: value})


def test_what_is_derived() -> None:
    class Mixed(Front):
        class Options(tp.StrategyOptions):
            keep: float = 0.5
            layer: int = 2
            switch: bool = False
            depth: Depth = 0.5
            amount: Amount = 0.25
            layers: tuple[int, ...] = (2, 4)
            other: tuple[int, ...] = (1,)
            text: str = "a"
            count: int = 4
            share: float = 0.3
            factor: float = 2.0
            seed: int = 0

    space = derived(Mixed(), 0.5, SHAPE)
    assert {option: str(domain) for option, domain in space.domains.items() if option != "layers"} == {
        "layer": "0 … 11",
        "switch": "False, True",
        "depth": "1 … 11",
        "amount": "0.05 … 1.0",
        "count": "0 … 16",
        "share": "0.0 … 1.0",
        "factor": "0.0 … 8.0",
    }
    assert all(0 < first < second < 12 for first, second in space.domains["layers"].values)
    assert space.left_out.keys() == {"keep", "other", "text", "seed"}


def test_layers_are_searched_and_sizes_are_not() -> None:
    space = derived(tp.strategy("csp"), 0.35, SHAPE)
    assert {"scatter_at", "prune_at", "clustering", "reentry"} <= space.domains.keys()
    assert space.left_out["keep"] == space.left_out["representatives"] == "the budget moves it"
    given = parse_search(tp.strategy("csp"), ["representatives=0.1..0.5"])
    assert derived(tp.strategy("csp"), 0.35, SHAPE, given).domains["representatives"] == Range(0.1, 0.5)
    both = parse_search(tp.strategy("csp"), ["representatives=0.1..0.5", "keep=0.1..0.2"])
    with pytest.raises(OptionError, match="is what the budget moves"):
        derived(tp.strategy("csp"), 0.35, SHAPE, both)


def test_options_without_effect_are_left_out_of_combinations(tmp_path: Path) -> None:
    about = {"model": "fake", "dataset": "counted", "options": {"positions": "keep"}}
    found = tune("fastv", tmp_path, budget=0.6, trials=8, limit=2, confirm_limit=2, **about)
    random = [trial for trial in found.search.trials if trial.options.get("layer") == 0]
    assert all(trial.options == {"layer": 0} for trial in random)
    assert [trial.repeats for trial in random] == [None, random[0].number]


# the command ---------------------------------------------------------------------------------------------------------

COMMAND = ("tune", "front", "--model", "fake", "--dataset", "rectangles", "--limit", 2, "--confirm-limit", 4)


def test_the_command(run: Runner, tmp_path: Path) -> None:
    ran = run(*COMMAND, "--budget", 0.6, "--trials", 3, "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    for part in ("front at 0.6 on fake, rectangles (val), 4 queries", "untouched", "tuned 1", "gIoU on train", "ran"):
        assert part in ran.out
    assert f"wrote {tmp_path / 'run' / FILE}" in ran.err
    stored = json.loads((tmp_path / "run" / FILE).read_text())
    assert stored["space"] == {"layer": [0, 1, 2, 3]}
    assert stored["left_out"].keys() == {"keep", "note"}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (("--search", "layer=3..1"), "found a range from 3 to 1"),
        (("-o", "layr=1"), "did you mean 'layer'"),
        (("--confirm-split", "train"), "confirm on another one"),
        (("--dtype", "float3"), "float3"),
    ],
)
def test_errors_of_the_command(run: Runner, tmp_path: Path, given: tuple[str, ...], part: str) -> None:
    assert_one_line(run(*COMMAND, *given, "--out", tmp_path / "run"), part)
