"""Compositions: two strategies as one, names, budgets, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench, layout_of

import tokenprune
from tokenprune.core.by_name import names_in
from tokenprune.core.composition.sequence import Sequence
from tokenprune.core.decisions import Keep, Merge
from tokenprune.core.reads import Embeddings, HiddenStates, TowerFeatures
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.stage import Shape, Stage, equivalent_tokens
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.errors import BudgetError, OptionError, PluginError, TokenPruneError, UnknownNameError
from tokenprune.evaluation.contenders import contenders
from tokenprune.plugins import registry
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

QUICK = settings(max_examples=30, deadline=None)
BATCH = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=2), min_size=1, max_size=3)
LAYERS = 4
LLAMA = tiny_llama(LAYERS)
OURS = [name for name, entry in registry.strategies().items() if entry.distribution == "tokenprune-vlm"]
SHAPE = Shape(12, 60)


def forward(strategy: Strategy, images: list[list[int]], seed: int) -> Any:
    layout = layout_of(images)
    embeds = torch.randn(*layout.valid.shape, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), prune(LLAMA, strategy, image_tokens=layout.image_tokens) as run:
        output = LLAMA.model(inputs_embeds=embeds, attention_mask=layout.valid.long())
    return output.last_hidden_state, run.trace


def among(kept: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
    """`again`, bool over the kept ones of every row, as a choice among the kept ones renumbered."""
    rows = [again[row, kept[row]] for row in range(len(kept))]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=False)


# one part after the other --------------------------------------------------------------------------------------------


@QUICK
@given(BATCH, st.integers(0, 10**6), st.sampled_from([(0, 0), (0, 2), (1, 3)]), st.sampled_from(["keep", "renumber"]))
def test_keep_after_keep_is_one_keep(
    images: list[list[int]], seed: int, layers: tuple[int, int], positions: str
) -> None:
    exists = layout_of(images).slots >= 0
    draw = torch.Generator().manual_seed(seed)
    first = exists & (torch.rand(exists.shape, generator=draw) < 0.7)
    second = first & (torch.rand(exists.shape, generator=draw) < 0.6)
    parts = [
        Scripted([Step(layers[0], Keep.where(first))], positions=positions),
        Scripted([Step(layers[1], Keep.where(among(first, second)))], positions=positions),
    ]
    once = [Step(layers[0], Keep.where(first)), Step(layers[1], Keep.where(second))]
    found, trace = forward(Sequence(*parts), images, seed)
    expected, wanted = forward(Scripted(once, positions=positions), images, seed)
    assert torch.equal(found, expected)
    assert trace.stages[-1].kept == wanted.stages[-1].kept
    if layers[0] == layers[1]:
        assert torch.equal(found, forward(Scripted(once[1:], positions=positions), images, seed)[0])


@QUICK
@given(BATCH, st.integers(0, 10**6), st.sampled_from(["keep", "renumber"]))
def test_a_part_may_park_restore_and_merge_what_is_left(images: list[list[int]], seed: int, positions: str) -> None:
    """A random script on all tokens, and the same with its numbers moved, on the tokens that a first part leaves."""
    exists = layout_of(images).slots >= 0
    kept = exists & (torch.rand(exists.shape, generator=torch.Generator().manual_seed(seed)) < 0.7)
    kept[:, 0] = exists[:, 0]
    sizes = kept.sum(1)
    inner = torch.arange(int(sizes.max())) < sizes[:, None]
    script = random_script(inner, LAYERS, 32, seed, positions=positions)
    first = Scripted([Step(0, Keep.where(kept))], positions=positions)
    whole, trace = forward(Sequence(first, script), images, seed)
    numbers = [row.nonzero().flatten().tolist() for row in kept]
    layout = layout_of(images)
    embeds = torch.randn(*layout.valid.shape, 32, generator=torch.Generator().manual_seed(seed))
    for row, own in enumerate(numbers):  # the row cut by hand, and the script alone on it
        slots = layout.slots[row][own]
        present = layout.valid[row] & ~layout.image_tokens[row]
        present[slots] = True
        short, mask = embeds[row, present][None], layout.image_tokens[row, present][None]
        ids = torch.arange(layout.valid.shape[1])[present][None]
        with torch.no_grad(), prune(LLAMA, script.row(row, len(own)), image_tokens=mask) as run:
            alone = LLAMA.model(inputs_embeds=short, position_ids=ids if positions == "keep" else None)
        torch.testing.assert_close(whole[row, present], alone.last_hidden_state[0], atol=1e-5, rtol=1e-4)
        for stage, mine in zip(trace.stages[1:], run.trace.stages, strict=True):
            assert stage.kept[row] == [own[token] for token in mine.kept[0]]
            assert stage.mass[row][own].tolist() == pytest.approx(mine.mass[0].tolist())


@pytest.mark.parametrize("second", ["fastv", "similarity"])
def test_a_first_part_before_the_decoder_is_a_shorter_input(second: str) -> None:
    """DivPrune renumbers, FastV keeps: as FastV alone on the input that DivPrune leaves."""
    images, part = [[20]], tokenprune.strategy(second, layer=2, keep=4)
    found, trace = forward(Sequence("divprune", part, parts=({"keep": 9}, {})), images, 3)
    layout = layout_of(images)
    present = layout.valid[0] & ~layout.image_tokens[0]
    present[layout.slots[0][trace.stages[0].active[0]]] = True
    embeds = torch.randn(*layout.valid.shape, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), prune(LLAMA, part, image_tokens=layout.image_tokens[:, present]) as run:
        alone = LLAMA.model(inputs_embeds=embeds[:, present]).last_hidden_state
    kept = torch.tensor(trace.stages[0].kept[0])
    assert trace.stages[1].kept[0] == kept[run.trace.stages[0].active[0]].tolist()
    torch.testing.assert_close(found[:, present], alone, atol=1e-5, rtol=1e-4)
    assert trace.policies["positions"] == "renumber, then keep"


# every pair ----------------------------------------------------------------------------------------------------------

REASONS = ("part 1, ", "cannot meet budget", "depends on the image")


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
@pytest.mark.parametrize("first", OURS)
def test_any_two_strategies_run_or_are_refused_with_a_reason(first: str, part: int) -> None:
    """At half of the tokens each where they take a budget: account as declared, rows as they would be alone.

    By default a third of the pairs, in which every strategy is first and second with others of all kinds.
    """
    rows = [[60], [40, 9]]
    for second in OURS[(part - OURS.index(first)) % 3 :: 3]:
        strategy = Sequence(*(contenders([name], 0.5)[0].strategy for name in (first, second)))
        try:
            bench = Bench(strategy, rows)
        except TokenPruneError as error:
            refusal = str(error)
        else:
            trace = bench.run().trace
            alone = [Bench(strategy, [images], seeds=[row]).run().trace for row, images in enumerate(rows)]
            for row, one in enumerate(alone):
                found = [(stage.name, stage.layer, stage.kept[row]) for stage in trace.stages_of(row)]
                assert found == [(stage.name, stage.layer, stage.kept[0]) for stage in one.stages], second
            declared = [entry.image[0] for entry in declared_ledger(strategy, Shape(12, 60)).entries]
            assert [entry.image[0] for entry in trace.ledger.entries] == declared, second
            continue
        assert strategy.name in refusal
        assert any(reason in refusal for reason in REASONS), refusal


# what a part sees ----------------------------------------------------------------------------------------------------


class Probe(Strategy):
    """Keeps everything and notes what it was given."""

    name = "probe"

    def __init__(self, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer

    def stages(self, shape: Shape) -> list[Stage]:
        return [Stage("look", self.layer, shape.image_tokens, (HiddenStates(), TowerFeatures(), Embeddings()))]

    def choose(self, stage: Stage, tokens: Any) -> Keep:
        tokens.memory["was here"] = True
        names = "counts image grid places text_places images_before mass hidden features embeddings active origin"
        self.seen = {name: getattr(tokens, name) for name in names.split()}
        return Keep.where(tokens.active)


class Moving(Strategy):
    """Ends with three tokens in the first slots: token 5 as it was, the mean of 2 and 3 without a place, token 7."""

    name = "moving"

    def stages(self, shape: Shape) -> list[Stage]:
        return [Stage("move", 0, 3)]

    def choose(self, stage: Stage, tokens: Any) -> Merge:
        weights = torch.zeros(1, 3, tokens.exists.shape[1])
        weights[0, 0, 5], weights[0, 1, 2:4], weights[0, 2, 7] = 1, 0.5, 1
        return Merge(torch.tensor([[0, 1, 2]]), weights=weights, origin=torch.tensor([[5, -1, 7]]))


def test_a_part_sees_tokens_where_they_are_now() -> None:
    probe = Probe()
    bench = Bench(Sequence(Moving(), probe), [[9]])
    states, features = bench.states[0].clone(), bench.drawn("features", 8)[0]
    bench.enter(0)
    seen = probe.seen
    moved = torch.stack((states[5], states[2:4].mean(0), states[7]))
    torch.testing.assert_close(seen["hidden"][0], moved)
    torch.testing.assert_close(seen["features"][0], torch.stack((features[5], features[2:4].mean(0), features[7])))
    assert seen["grid"][0].tolist() == [[1, 2], [-1, -1], [2, 1]]
    assert seen["counts"].tolist() == [3]
    assert seen["places"][0].tolist() == [1, 2, 3]
    assert seen["text_places"][0].tolist() == [0, 4, 5]
    assert seen["images_before"][0].tolist() == [0, 3, 3]
    assert seen["origin"][0].tolist() == [0, -1, 2]
    assert seen["mass"][0].tolist() == [1, 1, 1]
    assert bench.planned[0].group.memory.keys() == {"1:moving", "2:probe"}


def test_embeddings_are_what_enters_the_first_layer() -> None:
    layout = layout_of([[9]])
    embeds = torch.randn(*layout.valid.shape, 32, generator=torch.Generator().manual_seed(5))

    class Looks(Probe):
        def stages(self, shape: Shape) -> list[Stage]:
            return [Stage("look", self.layer, shape.image_tokens, (Embeddings(),))]

        def choose(self, stage: Stage, tokens: Any) -> Keep:
            self.seen = {"embeddings": tokens.embeddings}
            return Keep.where(tokens.active)

    looks = [Looks(0), Looks(2)]
    forward(Sequence(Moving(), *looks), [[9]], 5)
    image = embeds[0, layout.slots[0]]
    for look in looks:
        torch.testing.assert_close(
            look.seen["embeddings"][0], torch.stack((image[5], image[2:4].mean(0), image[7])), atol=1e-6, rtol=1e-5
        )


def test_what_a_part_gets_wrong_is_said_of_the_part() -> None:
    class Wrong(Probe):
        name = "wrong"

        def choose(self, stage: Stage, tokens: Any) -> Keep:
            return Keep(torch.tensor([[0, 7]]))

    with pytest.raises(
        PluginError, match=r"'uniform\+wrong: wrong', stage 'look': index out of range: 7; expected .*4"
    ):
        Bench(Sequence(tokenprune.strategy("uniform", keep=5), Wrong()), [[20]]).run()


# names, options, budgets ---------------------------------------------------------------------------------------------


def test_names_are_taken_apart_and_registered_ones_win() -> None:
    known = {"prumerge": 0, "prumerge+": 0, "fastv": 0}
    assert names_in("prumerge+fastv", known) == ["prumerge", "fastv"]
    assert names_in("prumerge++fastv", known) == ["prumerge+", "fastv"]
    assert names_in("fastv+prumerge+", known) == ["fastv", "prumerge+"]
    assert names_in("prumerge++prumerge+", known) == ["prumerge+", "prumerge+"]
    assert names_in("fastv+other", known) is None
    assert tokenprune.strategy("prumerge+").name == "prumerge+"
    assert tokenprune.strategy("prumerge++fastv", budget=0.3).name == "prumerge++fastv"
    with pytest.raises(UnknownNameError, match="unknown strategy 'fatsv'; did you mean 'fastv'"):
        tokenprune.strategy("uniform+fatsv")


def test_options_of_the_parts() -> None:
    made = tokenprune.strategy("uniform+fastv+fastv", parts=({"keep": 0.5}, {"layer": 3}, {"layer": 6, "keep": 4}))
    stages = list(made.stages(Shape(12, 64)))
    assert [(s.name, s.layer, s.tokens) for s in stages] == [
        ("1:uniform/uniform", 0, 32),
        ("2:fastv/prune", 3, 16),
        ("3:fastv/prune", 6, 4),
    ]
    nested = Sequence(Sequence("uniform", "fastv"), tokenprune.strategy("fastv", layer=5))
    assert [part.name for part in nested.parts] == ["uniform", "fastv", "fastv"]
    assert repr(made) == "Sequence(Uniform(keep=0.5), FastV(layer=3), FastV(layer=6, keep=4))"


@pytest.mark.parametrize("budgets", [(0.5, 0.25), "0.5/0.25", [0.5, 0.25]])
def test_budgets_of_the_parts_are_of_what_is_left(budgets: Any) -> None:
    made = tokenprune.strategy("uniform+fastv", budgets=budgets)
    first, second = made.stages(Shape(12, 64))
    assert first.tokens == 32
    assert (2 * 32 + 10 * second.tokens) / 12 <= 0.25 * 32 < (2 * 32 + 10 * (second.tokens + 1)) / 12
    trace = Bench(made, [[64], [48]]).run().trace
    assert [entry.image[0] for entry in trace.ledger.entries] == [32] * 2 + [second.tokens] * 10
    left = tokenprune.strategy("uniform+fastv", budgets="-/0.5")
    assert [stage.tokens for stage in left.bind(Shape(12, 64)).stages(Shape(12, 64))] == [16, 6]


@QUICK
@given(
    st.sampled_from(["uniform+fastv", "divprune+fastv", "prumerge+similarity", "random+uniform", "divprune+csp"]),
    st.integers(6, 40),
    st.integers(16, 600),
    st.floats(0.05, 1),
)
def test_a_budget_for_the_whole_is_met(name: str, layers: int, total: int, budget: float) -> None:
    shape = Shape(layers, total)
    try:
        bound = tokenprune.strategy(name, budget).bind(shape)
    except BudgetError:
        assert budget < 0.4
        return
    spent = equivalent_tokens(list(bound.stages(shape)), shape)
    assert spent <= budget * total + 1e-6
    if "csp" not in name:
        assert spent > budget * total - 3
    assert declared_ledger(bound, shape).equivalent_tokens == pytest.approx(spent)


def test_a_budget_goes_to_the_parts_that_have_none() -> None:
    shape = Shape(12, 100)
    made = Sequence(tokenprune.strategy("uniform", keep=0.6), tokenprune.strategy("fastv"), budget=0.3).bind(shape)
    first, second = made.stages(shape)
    assert first.tokens == 60
    assert (2 * 60 + 10 * second.tokens) / 12 <= 30 < (2 * 60 + 10 * (second.tokens + 1)) / 12
    with pytest.raises(BudgetError, match=r"'uniform\+fastv' cannot meet budget 0\.1.*the smallest possible budget is"):
        Sequence(
            tokenprune.strategy("uniform", keep=0.6), tokenprune.strategy("fastv", keep=0.5, layer=2), budget=0.1
        ).bind(shape)
    fixed = Sequence(tokenprune.strategy("uniform", keep=0.2), tokenprune.strategy("fastv", 0.5), budget=0.3)
    assert next(iter(fixed.bind(shape).stages(shape))).tokens == 20


def test_seeds_move_in_every_part() -> None:
    made = Sequence("random", "random", budget=0.3)
    moved = made.reseeded(7)
    assert moved.budget == 0.3
    assert [part.options.seed for part in moved.parts] == [7, 7]  # type: ignore[attr-defined]
    kept = [Bench(strategy, [[40]]).run().trace.stages[1].kept for strategy in (made, made, moved)]
    assert kept[0] == kept[1] != kept[2]


def test_comparisons_give_compositions_budgets() -> None:
    found = contenders(["uniform+fastv", "uniform+fastv:budgets=0.5/0.25"], [0.3, 0.2])
    assert [(c.budget, c.strategy.budget) for c in found] == [(0.3, 0.3), (0.2, 0.2)] * 2
    assert found[2].label == "uniform+fastv (budgets=0.5/0.25) at most 0.3"


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("fastv+uniform", {}, "'fastv', has its last stage at layer 2, and part 2, 'uniform', its first at layer 0"),
        ("fastv+fastv", {}, "reads the layer before, which ran on other tokens; begin part 2 at layer 3 or later"),
        ("csp+fastv", {}, "'csp', has its last stage at layer 6"),
        ("prumerge+fastv", {}, "a number of tokens that depends on the image"),
        ("blind+fastv", {}, "leaves no image token to part 2"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(name: str, options: dict[str, Any], found: str) -> None:
    strategy = tokenprune.strategy(name, **options)
    with pytest.raises(OptionError, match=found):
        Bench(strategy, [[64]])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"budgets": (0.5,)}, "option 'budgets': found 1 for 2 parts"),
        ({"budgets": (0.5, 1.5)}, "budgets"),
        ({"budgets": "0.5/much"}, "budgets"),
        ({"parts": ({},)}, "option 'parts': found 1 for 2 parts"),
        ({"parts": ({}, {"layr": 2})}, "unknown option 'layr'; did you mean 'layer'"),
        ({"layer": 2}, "unknown option 'layer'"),
        ({"budget": 2}, "budget must be a share of the image tokens .*, got 2"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        tokenprune.strategy("uniform+fastv", **options)


def test_one_strategy_is_no_composition_and_budgets_do_not_nest() -> None:
    with pytest.raises(OptionError, match="1 strategies found, expected at least two"):
        Sequence("fastv")
    with pytest.raises(OptionError, match="give budgets to its parts"):
        Sequence(Sequence("uniform", "fastv", budget=0.5), "fastv")


def test_a_part_whose_number_does_not_matter_follows_one_that_only_the_image_tells() -> None:
    adaptive = Sequence("prumerge", "prumerge")
    assert [stage.tokens for stage in adaptive.stages(SHAPE)] == [None, None]
    assert [len(stage.kept[0]) < 60 for stage in Bench(adaptive, [[60]]).run().trace.stages] == [True, True]


def test_rows_without_images_follow() -> None:
    strategy = tokenprune.strategy("uniform+fastv", 0.3)
    together = Bench(strategy, [[64], []]).run().trace
    assert [stage.kept[1] for stage in together.stages] == [[], []]
