"""What the author of a strategy gets wrong at first: each mistake has a message that names it and says what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from plugin_packages import install, registering
from pydantic import BaseModel, Field

import tokenprune as tp
from tokenprune import AttentionFrom, HiddenStates, Keep, Restore, Shape, Stage, Strategy, StrategyOptions
from tokenprune.cli.app import main
from tokenprune.core.scheduling.plan import plan
from tokenprune.errors import BudgetError, CheckpointError, PluginError, UnknownNameError, UnsupportedError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

pytest_plugins = ["pytester"]

MODEL = tiny_llama(4)
READS = (AttentionFrom("last"), HiddenStates())


class Half(Strategy):
    """What the mistakes are made in."""

    name = "half"
    budget_option = "keep"

    class Options(StrategyOptions):
        keep: float = Field(0.5, gt=0, le=1)

    def stages(self, shape):
        yield Stage("cut", 2, max(1, int(self.options.keep * shape.image_tokens)), READS)

    def choose(self, stage, tokens):
        return Keep.top(tokens.attention, tokens.target)


def mistaken(**parts) -> type[Half]:
    """`Half` with other parts."""
    return type("Mine", (Half,), {"name": "mine", **parts})


def refusal(kind: type[Strategy], **options) -> str:
    """What a run on two rows of different length is refused with."""
    image = torch.zeros(2, 14, dtype=torch.bool)
    image[0, 2:11] = image[1, 2:6] = True
    with pytest.raises(PluginError) as caught, torch.no_grad(), tp.prune(MODEL, kind(**options), image_tokens=image):
        MODEL(torch.arange(28).reshape(2, 14))
    return str(caught.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda self, shape: None, "stages() gave None; expected to yield each Stage, or a list of them"),
        (lambda self, shape: Stage("cut", 2, 3, READS), "stages() gave one Stage; expected to yield each"),
        (lambda self, shape: [("cut", 2, 3)], "stages() gave ('cut', 2, 3); expected to yield each"),
        (lambda self, shape: [self.keep], "stages() raised AttributeError: 'Mine' object has no attribute 'keep'"),
        (lambda self, shape: (1 / 0 for _ in "a"), "stages() raised ZeroDivisionError"),
        (lambda self, shape: [Stage("cut", 2, 3, AttentionFrom)], "AttentionFrom among its reads; expected objects"),
        (lambda self, shape: [Stage("cut", 2, 3, ("hidden",))], "stage 'cut': 'hidden' among its reads"),
        (lambda self, shape: [Stage("cut", 2, 4.5, READS)], "stage 'cut': tokens=4.5 is float; expected int"),
        (lambda self, shape: [Stage("cut", shape.layers / 2, 3, READS)], "layer=2.0 is float; expected int"),
        (lambda self, shape: [Stage("cut", 2, 3, READS, positions="new")], "positions='new'; expected 'keep' or"),
        (lambda self, shape: [Stage("cut", 0, 3, READS)], "begin it at layer 1 or later"),
        (lambda self, shape: [Stage("cut", 2, -4, READS)], "declares -4 tokens of 9; expected 0 … 9"),
    ],
)
def test_stages_that_are_none(stages, message: str) -> None:
    told = refusal(mistaken(stages=stages))
    assert told.startswith("strategy 'mine'")
    assert message in told
    assert not any(module._forward_pre_hooks for module in MODEL.modules())


def test_stages_may_count_with_numpy_and_list_their_reads() -> None:
    stage = Stage("cut", np.int64(2), np.int64(3), list(READS))
    assert (stage.layer, stage.tokens, stage.reads) == (2, 3, READS)
    assert type(stage.tokens) is int
    assert Stage("cut", 2, reads=HiddenStates()).reads == (HiddenStates(),)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda s, stage, t: Keep.top(t.attention[0], t.target), "scores of shape [9]; expected [batch, N]"),
        (lambda s, stage, t: Keep.top(t.attention.T, t.target), "2 counts and scores of shape [9, 2]; expected one"),
        (lambda s, stage, t: Keep.where(Keep.top(t.attention, t.target).index), "Keep.where was given [2, 4] torch.in"),
        (lambda s, stage, t: Restore.where(t.exists[0]), "Restore.where was given [9] torch.bool; expected bool [b"),
        (lambda s, stage, t: Keep.top(t.atention, t.target), "no attribute 'atention'; did you mean 'attention'?"),
        (lambda s, stage, t: Keep.top(t.attention, t.targets), "no attribute 'targets'; did you mean 'target'?"),
    ],
)
def test_answers_of_the_wrong_shape(choose, message: str) -> None:
    told = refusal(mistaken(choose=choose))
    assert told.startswith("strategy 'mine'")
    assert message in told


class Plain(BaseModel):
    keep: float = 0.5


class Whole(StrategyOptions):
    keep: int = 16


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"Options": Plain}, "Options is <class '.*Plain'>; expected a class that inherits tokenprune.StrategyOptions"),
        ({"Options": {"keep": 0.5}}, r"Options is \{'keep': 0.5\}; expected a class"),
        ({"Options": Whole}, "budget_option 'keep' is of type int; expected a float option"),
        ({"budget_option": "kep"}, r"budget_option 'kep' is none of its options \(keep\); expected a float option"),
        ({"positions": "renumbered"}, "positions='renumbered'; expected 'keep' or 'renumber'"),
        ({"name": None}, "strategy class Mine has no name; expected one, as in name = 'mine'"),
    ],
)
def test_classes_that_cannot_work(parts, message: str) -> None:
    assert re.search(message, refusal(mistaken(**parts), budget=0.7))


def test_the_least_budget_is_told_where_an_option_may_not_be_zero() -> None:
    with pytest.raises(BudgetError, match=r"the smallest possible budget is 0\.550; raise the budget"):
        Half(budget=0.2).bind(Shape(layers=4, image_tokens=10))


def test_an_option_that_the_user_set_is_kept_where_a_budget_is_given_too() -> None:
    shape = Shape(layers=4, image_tokens=10)
    assert Half(keep=0.3, budget=0.9).bind(shape).options.keep == 0.3
    with pytest.raises(
        BudgetError,
        match=r"cannot meet budget 0\.6 .* with options \{'keep': 0\.3\}: the smallest possible budget is 0\.650",
    ):
        Half(keep=0.3, budget=0.6).bind(shape)


def test_a_name_that_nobody_has_tells_of_plugins_that_could_not_be_loaded(monkeypatch, tmp_path, capsys) -> None:
    install(tmp_path, "my-pack", registering("mine").replace("register_strategies", "register_strategys"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    registry.reset()
    try:
        with pytest.raises(UnknownNameError, match=r"could not be loaded: plugin 'plug' of package 'my-pack' \(token"):
            tp.strategy("mine")
        (tmp_path / "config.json").write_text('{"model_type": "of nobody"}')
        with pytest.raises(CheckpointError, match=r"no adapter knows this checkpoint.* could not be loaded: plugin 'p"):
            tp.load(tmp_path)
        model = tiny_llama()
        model.config.vision_config = {}
        with pytest.raises(UnsupportedError, match=r"no adapter knows the model.* could not be loaded: plugin 'plug'"):
            tp.compatible("uniform", model)
        for command in (["list"], ["list", "--plugins"]):
            with pytest.raises(SystemExit):
                main(command)
            told = " ".join(capsys.readouterr().out.split())
            assert "broken: plugin 'plug' of package 'my-pack': there is no hook" in told
            assert "did you mean tokenprune_register_strategies?" in told
    finally:
        monkeypatch.undo()
        registry.reset()


def test_the_command_line_says_how_to_see_where_a_plugin_failed(monkeypatch, capsys) -> None:
    def fail() -> None:
        try:
            raise KeyError("rank")
        except KeyError as error:
            raise PluginError("strategy 'mine', stage 'cut' raised KeyError: 'rank'") from error

    monkeypatch.setattr("tokenprune.cli.app.app", lambda **options: fail())
    for arguments, hint in ((["flops"], True), (["flops", "--debug"], False)):
        with pytest.raises(SystemExit):
            main(arguments)
        told = capsys.readouterr().err
        assert told.endswith("'rank' (--debug shows the traceback)\n") is hint
        assert ("Traceback" in told) is not hint


def test_the_kit_tells_a_mistake_once_and_with_its_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from tokenprune import AttentionFrom, Keep, Stage, Strategy
        from tokenprune.testing.strategy_conformance import StrategyConformance

        class Mine(Strategy):
            name = "mine"
            def stages(self, shape):
                yield Stage("cut", 2, shape.image_tokens // 2, AttentionFrom("last"))
            def choose(self, stage, tokens):
                return Keep.top(tokens.attention[:, 0, 0], tokens.target)

        class Unsorted(Mine):
            def choose(self, stage, tokens):
                return Keep(Keep.top(tokens.attention, tokens.target).index.flip(1))

        class None_(Mine):
            def stages(self, shape):
                pass

        class TestMine(StrategyConformance):
            strategy, examples = Mine, 3

        class TestUnsorted(StrategyConformance):
            strategy, examples = Unsorted, 3

        class TestNone(StrategyConformance):
            strategy, examples = None_, 3
        """
    )
    result = pytester.runpytest_subprocess("-k", "llama or cached or hook", "--hypothesis-seed=1")
    assert result.parseoutcomes()["failed"] >= 7  # nine, where every test drew two tokens to put out of order
    result.stdout.fnmatch_lines(
        [
            "the run fails: strategy 'mine', stage 'cut' raised IndexError: *",
            "raised at",
            "  test_mine.py:9, in choose: return Keep.top(tokens.attention[[]:, 0, 0[]], tokens.target)",
            "model     llama: *",
            "again     pytest *test_mine.py::TestMine::*",
            "as in test_engine_equals_masked_oracle[[]llama[]]: the run fails: strategy 'mine', stage 'cut' raised *",
            "the run fails: strategy 'mine', stage 'cut': *",
            "the run fails: strategy 'mine': stages() gave None; *",
        ]
    )
    assert "modeling_llama" not in result.stdout.str()
    assert len(result.outlines) < 100


def test_a_stage_outside_the_model_is_told_with_a_budget_too() -> None:
    class Late(Half):
        def stages(self, shape):
            yield Stage("late", 40, tokens=max(1, int(self.options.keep * shape.image_tokens)))

    for budget in (None, 0.5):
        with pytest.raises(PluginError, match=r"stages at layers \[40\] found, expected ascending layers in 0 … 7"):
            plan(Late(budget=budget), [Shape(layers=8, image_tokens=16)])
