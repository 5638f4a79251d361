"""The conformance kit: every built-in strategy passes it, sabotaged ones and a sabotaged engine do not."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tokenprune as tp
from tokenprune.core.decisions import Keep, Restore
from tokenprune.core.reads import AttentionFrom, HiddenStates
from tokenprune.core.scheduling.requirements import DECODER_READS
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine.prefill import Prefill
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.testing.kit import invariants
from tokenprune.testing.kit.cases import Case, Row, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, model_of
from tokenprune.testing.kit.printing import ranges, show_case
from tokenprune.testing.kit.recording import run
from tokenprune.testing.kit.synthetic_vision import synthetic_vision_of
from tokenprune.testing.kit.verdict import Nonconforming, NotTested, Tied
from tokenprune.testing.strategy_conformance import StrategyConformance

pytest_plugins = ["pytester"]

BUILT_IN = [name for name, entry in tp.strategies().items() if entry.distribution == "tokenprune-vlm"]
for _name in BUILT_IN:
    _words = re.sub(r"\W", "_", _name.replace("+", "_plus"))
    _given = {"strategy": _name, "budget_slack": None if _name == "blind" else 1.0}
    globals()[f"Test_{_words}"] = type(f"Test_{_words}", (StrategyConformance,), {**_given, "examples": 3})
    _thorough = type(f"TestMore_{_words}", (StrategyConformance,), {**_given, "examples": 10})
    globals()[f"TestMore_{_words}"] = pytest.mark.slow(_thorough)

TWO = Case("llama", (Row(((2, 3),), 1, 2, 10), Row(((3, 3), (1, 2)), 2, 3, 21)), "left")


def test_all_built_in_strategies_are_here() -> None:
    assert {"none", "csp", "fastv", "dart"} <= set(BUILT_IN)


class Half(Strategy):
    """Half of the image tokens, by attention, from layer 2 on."""

    name = "half"
    rest = "drop"

    def stages(self, shape: Shape):
        yield Stage("halve", 2, shape.image_tokens // 2, (AttentionFrom("last"),))

    def choose(self, stage, tokens):
        return Keep.top(tokens.attention, tokens.target, rest=self.rest)


class Back(Half):
    """The same, parked, and restored at layer 5."""

    rest = "park"

    def stages(self, shape: Shape):
        yield from super().stages(shape)
        yield Stage("back", 5, shape.image_tokens)

    def choose(self, stage, tokens):
        return Restore.where(tokens.parked) if stage.name == "back" else super().choose(stage, tokens)


class RowZero(Half):
    """Every row takes what row 0 attends to."""

    def choose(self, stage, tokens):
        return Keep.top(tokens.attention[:1].expand_as(tokens.attention).nan_to_num(), tokens.target)


class Noise(Half):
    """By what rounding leaves of lengths that are all 1: nothing but ties."""

    def stages(self, shape: Shape):
        yield Stage("halve", 2, shape.image_tokens // 2, (HiddenStates(),))

    def choose(self, stage, tokens):
        lengths = torch.linalg.vector_norm(torch.nn.functional.normalize(tokens.hidden, dim=-1), dim=-1)
        return Keep.top(lengths.masked_fill(~tokens.exists, -1), tokens.target)


class Dice(Half):
    """Draws from the global generator."""

    def choose(self, stage, tokens):
        return Keep.top(torch.rand(tokens.exists.shape).masked_fill(~tokens.exists, -1), tokens.target)


class Scribbling(Half):
    """Writes to what it was lent."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def choose(self, stage, tokens):
        chosen = super().choose(stage, tokens)
        self.write(tokens.places)
        return chosen


class Hooking(Half):
    """Leaves a hook on the model."""

    def choose(self, stage, tokens):
        model_of("llama").lm_head.register_forward_hook(print)
        return super().choose(stage, tokens)


class Budgeted(Half):
    """Its budget is a number of tokens from layer 2 on."""

    def stages(self, shape: Shape):
        kept = shape.image_tokens // 2 if self.budget is None else self.kept(self.budget, shape)
        yield Stage("halve", 2, kept, (AttentionFrom("last"),))

    def bind(self, shape: Shape):
        return self


class Spending(Budgeted):
    """Forgets the layers before its stage."""

    def kept(self, budget: float, shape: Shape) -> int:
        return int(budget * shape.image_tokens)


class Backwards(Budgeted):
    """The larger the budget, the fewer."""

    def kept(self, budget: float, shape: Shape) -> int:
        return int((1 - budget) * shape.image_tokens)


class Stingy(Budgeted):
    """Never keeps a token."""

    def kept(self, budget: float, shape: Shape) -> int:
        return 0


@pytest.fixture
def clean_model():
    yield
    model_of("llama").lm_head._forward_hooks.clear()


def met(case, strategy):
    invariants.budget_is_met(case, strategy, 1.0)


def monotone(case, strategy):
    invariants.budget_is_monotone(case, strategy, 0.25)


SABOTAGED = {
    "row zero": (RowZero, invariants.row_equals_row_alone, r"row 1, stage 'halve': active tokens .* in the batch"),
    "dice": (Dice, invariants.deterministic_under_a_seed, r"stage 'halve', row 0: tokens .* in one run"),
    "hook": (Hooking, invariants.no_hook_is_left, r"after a run the model is not as it was: lm_head: _forward_hooks"),
    "spends": (Spending, met, r"row 0 spends 3\.750 equivalent tokens, above the budget's 3\.000 \(0\.5 of 6\)"),
    "stingy": (Stingy, met, r"row 0 spends 1\.500 equivalent tokens, 1 or more below the budget's 3\.000"),
    "backwards": (
        Backwards,
        monotone,
        r"row 0 spends 4\.500 equivalent tokens at budget 0\.25, and only 3\.750 at 0\.5",
    ),
}


@pytest.mark.parametrize("name", sorted(SABOTAGED))
@pytest.mark.usefixtures("clean_model")
def test_sabotaged_strategies_fail(name: str) -> None:
    kind, invariant, message = SABOTAGED[name]
    with pytest.raises(Nonconforming, match=message) as caught:
        invariant(replace(TWO, budget=None if invariant not in (met, monotone) else 0.5), kind())
    assert "\n  row 1   2 text | image 0: tokens 0-8, a grid of 3 x 3 | 1 text | image 1: tokens" in str(caught.value)


def test_a_tie_is_nobodys_fault() -> None:
    """Where rounding alone decides between batch and alone, no strategy is blamed, and what would be wrong still is."""
    differ = 0
    for seed in range(20):
        case = replace(TWO, rows=tuple(replace(row, seed=seed + number) for number, row in enumerate(TWO.rows)))
        together = run(case, Noise()).trace.stages[0].kept
        alone = [run(case.alone(row), Noise()).trace.stages[0].kept[0] for row in range(2)]
        if together == alone:
            continue
        differ += 1
        with pytest.raises(Tied, match=r"row \d, stage 'halve': scores are equal up to rounding"):
            invariants.row_equals_row_alone(case, Noise())
        with pytest.raises(Nonconforming):
            invariants.row_equals_row_alone(case, RowZero())
    assert differ


def add_in_place(tensor):
    tensor.add_(1)


def add_to_data(tensor):
    tensor.data.add_(1)


def add_by_numpy(tensor):
    tensor.numpy()[:] += 1


@pytest.mark.parametrize("write", [add_in_place, add_to_data, add_by_numpy])
def test_writing_to_lent_tensors_is_told(write) -> None:
    with pytest.raises((Nonconforming, tp.TokenPruneError), match="places"):
        invariants.nothing_lent_is_written_to(TWO, Scribbling(write))


def breaking(monkeypatch, owner, name, change):
    """Let a method of the engine do something else with its result."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(self, right(self, *args, **kwargs)))


BROKEN = {
    "states": (
        Half,
        GatheredSequence,
        "gather",
        lambda self, out: out * 1.01,
        invariants.equals_oracle,
        "masked oracle differ by",
    ),
    "order": (
        Half,
        GatheredSequence,
        "prefill_table",
        lambda self, out: out.flip(-2),
        invariants.order_and_positions_are_kept,
        "in order",
    ),
    "cache": (
        Half,
        GatheredSequence,
        "decode_mask",
        lambda self, out: None,
        invariants.cached_equals_recomputed,
        "cached decoding and",
    ),
    "restored": (
        Back,
        GatheredSequence,
        "join",
        lambda self, out: out + 0.1,
        invariants.restore_restores,
        "off its parked state",
    ),
    "all kept": (
        tp.strategy("none").__class__,
        Prefill,
        "before_layer",
        lambda self, out: out * 1.01,
        invariants.keep_all_is_the_baseline,
        "all tokens are kept, and",
    ),
    "ledger": (
        Half,
        Prefill,
        "account",
        lambda self, out: self.trace.ledger.entries.append(
            replace(self.trace.ledger.entries.pop(), image=self.trace.ledger.image_tokens)
        ),
        invariants.ledger_equals_what_entered,
        r"layer 2: \[3, 5\] image tokens enter at width \d+, and the ledger says \[6, 11\]",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_engine_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, owner, method, change, invariant, message = BROKEN[name]
    case = replace(TWO, rows=(TWO.rows[0], replace(TWO.rows[1], before=4)))
    if name != "all kept":
        invariant(case, kind())
    breaking(monkeypatch, owner, method, change)
    if name == "all kept":
        monkeypatch.setattr(invariants, "TOLERANCE", 0)
    with pytest.raises(Nonconforming, match=message):
        invariant(case, kind())


def test_what_says_nothing_is_told() -> None:
    with pytest.raises(NotTested, match="never restores"):
        invariants.restore_restores(TWO, Half())
    invariants.restore_restores(TWO, Back())


def test_positions_of_three_axes_are_those_of_qwen2_vl() -> None:
    """Text counts on; an image's cells share the time and spread over height and width; text goes on behind them."""
    made = SyntheticBatch((Row(((2, 3),), 1, 2),), "right")
    assert made.positions_3d[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_layouts_are_shown_as_they_stand() -> None:
    assert show_case(TWO).splitlines()[2:] == [
        "  row 0   8 padding | 1 text | image 0: tokens 0-5, a grid of 2 x 3 | 2 text   (seed 10)",
        "  row 1   2 text | image 0: tokens 0-8, a grid of 3 x 3 | 1 text | image 1: tokens 9-10, a grid of 1 x 2 "
        "| 3 text   (seed 21)",
    ]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == "none"


def test_the_kit_offers_everything_that_can_be_read() -> None:
    """Else strategies that read what is missing would be skipped, and nobody would notice."""
    known = {getattr(tp, name) for name in tp.__all__ if isinstance(getattr(tp, name), type)}
    kinds = {kind for kind in known if issubclass(kind, tp.Read) and kind is not tp.Read}
    assert kinds - {*synthetic_vision_of(SyntheticBatch(TWO.rows, "right"), 32).answers} == {*DECODER_READS}


def test_all_families_are_there() -> None:
    assert list(FAMILIES) == ["llama", "grouped-kv", "sliding-window", "mixed-windows", "mrope"]
    config = {name: model_of(name).config for name in FAMILIES}
    assert config["grouped-kv"].num_key_value_heads < config["grouped-kv"].num_attention_heads
    assert config["sliding-window"].sliding_window == 6
    assert {"sliding_attention", "full_attention"} == set(config["mixed-windows"].layer_types)
    assert "mrope_section" in config["mrope"].rope_parameters


# the pytest plugin ---------------------------------------------------------------------------------------------------


def test_ties_are_drawn_anew(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from test_strategy_conformance import Noise
        from tokenprune.testing.strategy_conformance import StrategyConformance

        class TestMine(StrategyConformance):
            strategy = Noise
            examples = 30
        """
    )
    pytester.makeini(f"[pytest]\npythonpath = {__file__.rsplit('/', 1)[0]}")
    result = pytester.runpytest_subprocess("-k", "alone and TestMine", "--hypothesis-seed=3", "test_mine.py")
    result.assert_outcomes(passed=1)  # on what has no tie, such as batches of one row


def test_a_failure_is_readable_and_tells_how_to_see_it_again(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine="""
        from test_strategy_conformance import RowZero
        from tokenprune.testing.strategy_conformance import StrategyConformance

        class TestMine(StrategyConformance):
            strategy = RowZero
            examples = 60
        """
    )
    pytester.makeini(f"[pytest]\npythonpath = {__file__.rsplit('/', 1)[0]}")
    result = pytester.runpytest_subprocess(
        "-k", "alone", "--hypothesis-seed=3", "--tokenprune-strategy=none", "test_mine.py"
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*row *, stage 'halve': active tokens * in the batch, * alone; choose for every row *",
            "*strategy  RowZero()",
            "*model     *: *, 8 layers",
            "*layout    positions of each row, in order",
            "*row 1 * text | image 0: tokens *",
            "*schedule  image tokens active from each stage on",
            "*'halve' before layer 2: keep",
            "*row 0: * (* of *)",
            "*again     pytest test_mine.py::TestMine::test_batch_row_equals_row_alone --hypothesis-seed=3",
        ]
    )


def test_any_installed_strategy_from_the_command_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_other="def test_alone_too(): pass")
    named = [word for name in ("fastv", "random") for word in ("--tokenprune-strategy", name)]
    result = pytester.runpytest_subprocess(*named, "--tokenprune-options", "keep=2", "-k", "alone or restores", "-rs")
    result.assert_outcomes(passed=2, skipped=2)  # the project's own tests do not run
    result.stdout.fnmatch_lines(["SKIPPED*not tested: it never restores a token"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenprune-strategy", "fastvv"], "*unknown strategy 'fastvv'; did you mean 'fastv'*"),
        (
            ["--tokenprune-strategy", "fastv", "--tokenprune-options", "keep"],
            "*option 'keep' found, expected key=value*",
        ),
        (["--tokenprune-options", "keep=1"], "*give --tokenprune-strategy NAME too*"),
    ],
)
def test_wrong_options_are_told(pytester: pytest.Pytester, options: list[str], message: str) -> None:
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_the_plugin_is_light_and_the_kit_names_what_it_needs() -> None:
    light = "import sys, tokenprune.testing.plugin; print({'torch', 'hypothesis', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
    lacking = "import sys; sys.modules['hypothesis'] = None; import tokenprune.testing.strategy_conformance"
    ran = subprocess.run([sys.executable, "-c", lacking], capture_output=True, text=True, check=False)
    assert "needs pytest and hypothesis" in ran.stderr
    assert 'install the extra: pip install "tokenprune-vlm[test]"' in ran.stderr
