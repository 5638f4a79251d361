"""`ScorerStrategy`: the highest scores of a row, or of every image; what an author gets wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from strategy_bench import Bench
from torch import Tensor

import tokenprune as tp
from tokenprune.core.apportion import apportion
from tokenprune.core.options import Amount, tokens_of
from tokenprune.errors import OptionError, PluginError

QUICK = settings(max_examples=60, deadline=None)
ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=3)


class First(tp.ScorerStrategy):
    """The first number of every token's state; ties on purpose."""

    name = "first"
    reads = (tp.HiddenStates(),)

    class Options(tp.StrategyOptions):
        layer: int = 0
        keep: Amount = Field(0.5)

    options: Options

    def score(self, stage: tp.Stage, tokens: tp.Tokens) -> Tensor:
        return (tokens.hidden[..., 0] * 2).round()


class FirstOfImages(First):
    """The same in every image."""

    by_image = True


def highest(scores: list[float], numbers: list[int], count: int) -> list[int]:
    """Token numbers of the highest scores, ties by the lower number."""
    return sorted(sorted(numbers, key=lambda number: (-scores[number], number))[:count])


@QUICK
@given(ROWS, st.one_of(st.integers(1, 20), st.floats(0.01, 1)), st.integers(0, 3))
def test_the_highest_are_kept_per_row_and_per_image(rows: list[list[int]], keep: int | float, layer: int) -> None:
    for kind in (First, FirstOfImages):
        strategy = kind(keep=keep, layer=layer)
        bench = Bench(strategy, rows)
        stage = bench.planned[0].stage
        bench.run()
        (traced,) = bench.trace.stages
        assert (traced.name, traced.layer) == ("prune", layer)
        assert stage.reads == (tp.HiddenStates(),)
        assert traced.scores is not None
        for row, images in enumerate(rows):
            total, scores = sum(images), traced.scores[row].tolist()
            count, starts = tokens_of(keep, total), torch.tensor([0, *images]).cumsum(0).tolist()
            if kind is First:
                wanted = highest(scores, list(range(total)), count)
            else:
                shares = zip(starts, images, apportion(count, images), strict=False)
                wanted = [n for start, size, q in shares for n in highest(scores, list(range(start, start + size)), q)]
            assert traced.kept[row] == wanted
            alone = Bench(strategy, [images], seeds=[row]).run()
            assert alone.trace.stages[0].kept[0] == wanted


def test_a_token_that_is_not_active_is_never_kept() -> None:
    class Twice(First):
        """The second stage scores what the first has dropped highest."""

        def stages(self, shape: Any) -> Any:
            yield tp.Stage("one", 0, 4, self.reads)
            yield tp.Stage("two", 2, 2)

        def score(self, stage: tp.Stage, tokens: tp.Tokens) -> Tensor:
            numbers = torch.arange(tokens.exists.shape[1]).expand_as(tokens.exists)
            return -numbers if stage.name == "one" else numbers  # whole numbers, too

    one, two = Bench(Twice(), [[9]]).run().trace.stages
    assert one.kept[0] == [0, 1, 2, 3]
    assert two.kept[0] == [2, 3]


def test_a_budget_moves_keep() -> None:
    shape = tp.Shape(4, 16)
    assert repr(First(budget=0.5).bind(shape)) == "First(keep=8)"


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"'first': option 'layer': found 4, but the model has 4 layers; choose one of 0 … 3"
    ):
        list(First(layer=4).stages(tp.Shape(4, 16)))


def test_an_option_named_positions_is_the_policy() -> None:
    class Placed(First):
        class Options(First.Options):
            positions: str = "renumber"

    assert (First().positions, Placed().positions, Placed(positions="keep").positions) == ("keep", "renumber", "keep")
    with pytest.raises(PluginError, match="strategy 'first': option 'positions': positions='left'"):
        Placed(positions="left")


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (lambda tokens: tokens.hidden, r"torch.float32 \[1, 9, 6\]"),
        (lambda tokens: tokens.hidden[0, :, 0], r"torch.float32 \[9\]"),
        (lambda tokens: torch.zeros(1, 9, dtype=torch.complex64), r"torch.complex64 \[1, 9\]"),
        (lambda tokens: [1.0] * 9, "list"),
    ],
)
def test_what_is_no_score_is_refused(scores: Any, found: str) -> None:
    class Wrong(First):
        def score(self, stage: tp.Stage, tokens: tp.Tokens) -> Tensor:
            return scores(tokens)  # type: ignore[no-any-return]

    with pytest.raises(
        PluginError, match=rf"'first', stage 'prune': score\(\) gave {found}; expected real .* \[1, 9\]"
    ):
        Bench(Wrong(), [[9]]).run()


def test_a_stage_without_a_number_and_options_without_keep_are_refused() -> None:
    class Open(First):
        def stages(self, shape: Any) -> Any:
            yield tp.Stage("open", 0, None, self.reads)

    with pytest.raises(PluginError, match="stage 'open' declares no number of tokens"):
        Bench(Open(), [[9]]).run()

    class Bare(First):
        class Options(tp.StrategyOptions):  # type: ignore[assignment]
            pass

    with pytest.raises(PluginError, match="strategy 'first': Options has no number 'keep'"):
        Bench(Bare(), [[9]])
