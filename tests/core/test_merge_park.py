"""`Merge(rest="park")`: who is parked, what of, and that the mass over active and parked tokens stays what it was."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.layout import SequenceLayout, true_positions
from tokenprune.core.scheduling.state import TokenState
from tokenprune.core.scheduling.validation import check_decision
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.core.trace import Trace
from tokenprune.engine import prune
from tokenprune.errors import PluginError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, random_script
from tokenprune.testing.strategy_conformance import StrategyConformance
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH = 4, 32
MODEL = tiny_llama(LAYERS)


def start(size: int = 6) -> TokenState:
    return TokenState.start(torch.ones(1, size, dtype=torch.bool))


def merge(chosen: list[int], into: dict[int, dict[int, float]], size: int = 6, **options: object) -> Merge:
    """Tokens `chosen` stay; `into[k]` has the shares of the tokens that go into k."""
    weights = torch.zeros(1, len(chosen), size)
    for place, token in enumerate(chosen):
        for other, share in into[token].items():
            weights[0, place, other] = share
    return Merge(torch.tensor([chosen]), weights=weights, **options)  # type: ignore[arg-type]


GROUPS = {1: {1: 1.0, 0: 1.0}, 4: {4: 1.0, 3: 0.5}}  # 2 and 5 go nowhere


def numbers(mask: Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


def test_only_tokens_that_no_other_carries_are_parked() -> None:
    state = start().after(merge([1, 4], GROUPS, rest="park"))
    assert (numbers(state.active), numbers(state.parked), numbers(state.dropped)) == ([1, 4], [2, 5], [0, 3])
    assert state.mass.tolist() == [[0, 2, 1, 0, 1.5, 1]]
    assert state.origin.tolist() == [[0, 1, 2, 3, 4, 5]]
    carried = {token: numbers(state.stands_for()[:, token]) for token in range(6)}
    assert carried == {0: [], 1: [0, 1], 2: [2], 3: [], 4: [3, 4], 5: [5]}


def test_dropping_is_still_the_default() -> None:
    state = start().after(merge([1, 4], GROUPS))
    assert (numbers(state.parked), numbers(state.dropped)) == ([], [0, 2, 3, 5])
    assert state.mass.tolist() == [[0, 2, 0, 0, 1.5, 0]]


def test_a_parked_token_keeps_what_it_carries_through_later_merges() -> None:
    first = merge([0, 2, 5], {0: {0: 1, 1: 1}, 2: {2: 1, 3: 1}, 5: {5: 1}}, rest="park")  # parks 4
    second = merge([5], {5: {5: 1, 0: 1}}, rest="park")  # 0, which stands for two, goes; 2, which does too, is parked
    state = start().after(first).after(second)
    assert (numbers(state.active), numbers(state.parked), numbers(state.dropped)) == ([5], [2, 4], [0, 1, 3])
    assert state.mass.tolist() == [[0, 0, 2, 0, 1, 3]]
    assert numbers(state.stands_for()[:, 2]) == [2, 3]
    assert numbers(state.stands_for()[:, 5]) == [0, 1, 5]
    back = state.after(Restore(torch.tensor([[2, 4]])))
    assert (numbers(back.active), float(back.mass.sum())) == ([2, 4, 5], 6)
    last = back.after(merge([2], {2: {2: 1, 4: 1, 5: 1}}, rest="park"))
    assert last.mass.tolist() == [[0, 0, 6, 0, 0, 0]]
    assert numbers(last.stands_for()[:, 2]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("decision", "problem"),
    [
        (merge([1, 4], GROUPS, rest="keep"), r"Merge\(rest='keep'\); expected rest='drop' or rest='park'"),
        # half of 3 is carried by 4: it is not parked, and the other half would be lost
        (merge([1, 4], GROUPS, rest="park", conserves_mass=True), "image token 3 of batch row 0 goes 0.500 times"),
        # 2 stays active and nothing of it: a chosen token is not parked
        (
            merge([1, 2], {1: {1: 1.0}, 2: {3: 1.0}}, rest="park", conserves_mass=True),
            "image token 2 .* goes 0.000 times",
        ),
        (merge([1, 4], {1: {1: 1.0, 0: 1.0}, 4: {4: 1.0}}, conserves_mass=True), "image token 2 .* goes 0.000 times"),
    ],
)
def test_what_is_refused(decision: Merge, problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        check_decision(decision, start(), who="mine", stage="fold")


def test_mass_that_is_parked_counts_as_conserved() -> None:
    decision = merge([1, 4], {1: {1: 1.0, 0: 0.25}, 4: {4: 1.0, 0: 0.75}}, rest="park", conserves_mass=True)
    assert check_decision(decision, start(), who="mine", stage="fold") is decision


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_mass_over_active_and_parked_tokens_is_conserved(seed: int) -> None:
    """Merges that give every group's members away whole, park the rest, and take some of them back."""
    draw = torch.Generator().manual_seed(seed)
    state = start(9)
    for _ in range(6):
        active, parked = numbers(state.active), numbers(state.parked)
        order = torch.randperm(len(active), generator=draw).tolist()
        count = 1 + int(torch.randint(0, len(active), (1,), generator=draw))
        chosen = sorted(active[place] for place in order[:count])
        into: dict[int, dict[int, float]] = {token: {token: 1.0} for token in chosen}
        waiting = set()
        for token in sorted(set(active) - set(chosen)):
            share, target = torch.rand(2, generator=draw).tolist()
            if target < 0.4:
                waiting.add(token)
                continue
            first, second = chosen[0], chosen[-1]
            into[first][token] = 1.0 if first == second else share
            into[second].setdefault(token, 1 - share)
        decision = merge(chosen, into, 9, rest="park", conserves_mass=True)
        before = {token: float(state.mass[0, token]) for token in [*parked, *waiting]}
        state = state.after(check_decision(decision, state, who="mine", stage="fold"))
        assert float(state.mass.sum()) == pytest.approx(9, abs=1e-4)
        assert set(numbers(state.parked)) == set(before)
        assert {token: float(state.mass[0, token]) for token in before} == before
        assert not state.mass[state.dropped].any()
        whole = state.stands_for().any(1)  # nothing of any token is lost
        assert bool(whole.all())
        if torch.rand(1, generator=draw).item() < 0.5:
            state = state.after(Restore(torch.tensor([numbers(state.parked)[:2]])))


def layout_of(seed: int) -> SequenceLayout:
    image = torch.rand(2, 14, generator=torch.Generator().manual_seed(seed)) < 0.7
    image[:, 0] = False
    return SequenceLayout.from_mask(image)


def follow(
    script: Scripted, layout: SequenceLayout
) -> list[tuple[list[set[int]], list[set[int]], list[dict[int, float]]]]:
    """Active and parked numbers and masses of every row after each step, by plain loops over the definition."""
    rows = len(layout.valid)
    active = [set(range(int(count))) for count in layout.counts]
    parked: list[set[int]] = [set() for _ in range(rows)]
    mass = [dict.fromkeys(tokens, 1.0) for tokens in active]
    found = []
    for step in script.steps:
        decision: Decision = step.decision
        for row in range(rows):
            chosen = [token for token in decision.index[row].tolist() if token >= 0]
            if isinstance(decision, Restore):
                active[row], parked[row] = active[row] | {*chosen}, parked[row] - {*chosen}
                continue
            others = active[row] - {*chosen}
            assert isinstance(decision, (Keep, Merge))
            if isinstance(decision, Merge):
                shares = decision.weights[row].tolist()
                carried = {token for token in others if any(shares[k][token] for k in range(len(chosen)))}
                taken = {
                    token: sum(shares[k][other] * mass[row][other] for other in active[row])
                    for k, token in enumerate(chosen)
                }
                mass[row].update(dict.fromkeys(carried, 0.0))
                mass[row].update(taken)
                others -= carried
            if decision.rest == "park":
                parked[row] = parked[row] | others
            else:
                mass[row].update(dict.fromkeys(others, 0.0))
            active[row] = {*chosen}
        found.append(([*active], [{*tokens} for tokens in parked], [dict(of) for of in mass]))
    return found


def came_back(script: Scripted, trace: Trace) -> bool:
    """Whether a token that a merge parked was restored later."""
    waits = torch.zeros_like(trace.exists)
    for step, stage in zip(script.steps, trace.stages, strict=True):
        before = waits
        if isinstance(step.decision, Merge) and step.decision.rest == "park":
            waits = waits | stage.parked
        waits = waits & stage.parked
        if isinstance(step.decision, Restore) and bool((before & stage.active).any()):
            return True
    return False


def test_the_engine_keeps_parked_tokens_as_the_oracle_defines_it() -> None:
    """Random schedules: states, active and parked tokens, masses; and that the case itself is among them."""
    returned = 0
    for seed in range(150):
        layout = layout_of(seed)
        script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed)
        if not any(isinstance(step.decision, Merge) and step.decision.rest == "park" for step in script.steps):
            continue
        embeds = torch.randn(2, 14, WIDTH, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), prune(MODEL, script, image_tokens=layout.image_tokens) as run:
            states = MODEL.model(inputs_embeds=embeds).last_hidden_state
        ids = torch.arange(14).expand(2, -1)
        torch.testing.assert_close(
            states, masked_full_length(MODEL.model, embeds, layout, script, ids), atol=2e-5, rtol=0
        )
        for stage, (active, parked, masses) in zip(run.trace.stages, follow(script, layout), strict=True):
            assert [{*row} for row in stage.kept] == active
            assert [{*row.nonzero().flatten().tolist()} for row in stage.parked] == parked
            for row, own in enumerate(masses):
                for token, mass in own.items():
                    assert float(stage.mass[row, token]) == pytest.approx(mass, abs=1e-4)
        returned += came_back(script, run.trace)
    assert returned >= 5


class FoldAndReturn(Strategy):
    """Folds a fifth of the tokens into the first of each row, parks a fifth, and has those back later."""

    name = "fold-and-return"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """Two."""
        yield Stage("fold", 2)
        yield Stage("return", 4)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """By the token's number."""
        if stage.name == "return":
            return Restore.where(tokens.parked)
        size = tokens.exists.shape[1]
        fifth = torch.arange(size, device=tokens.device).expand_as(tokens.exists) % 5
        index = true_positions(tokens.active & (fifth != 3) & (fifth != 4))
        weights = torch.nn.functional.one_hot(index.clamp(min=0), size).to(torch.float32)
        weights[:, 0] += ((fifth == 3) & tokens.active).float()
        weights = weights.masked_fill((index < 0)[..., None], 0)
        return Merge(index, weights=weights, rest="park", conserves_mass=True)


class TestConformance(StrategyConformance):
    """What every strategy must hold, with tokens that a merge parks: batches, caches, paddings, positions."""

    strategy = FoldAndReturn
    examples = 5
    # It takes no budget.
    test_budget_is_met = test_budget_is_monotone = test_keep_all_is_the_baseline = None
