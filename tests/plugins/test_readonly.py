"""Strict mode: modifying a tensor of Tokens is an error, keeping one is told; nothing else holds it after the run."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

import tokenprune as tp
from tokenprune.core.decisions import Keep, Restore
from tokenprune.core.reads import AttentionFrom, Embeddings, HiddenStates
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.errors import PluginError, PluginWarning
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(4)


IDS = torch.arange(24).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True
READS = (AttentionFrom("last"), HiddenStates(), Embeddings())


def strategy(act):
    """A new class of strategies that does something with its tokens and then keeps half of them."""

    class Lent(Strategy):
        name = "borrower"

        def stages(self, shape):
            return [Stage("prune", 2, None, READS), Stage("again", 3)]

        def choose(self, stage, tokens):
            if stage.name == "again":
                return Keep.where(tokens.active)
            act(self, tokens)
            return Keep.top(tokens.attention.clone(), 3)

    return Lent()


def run(model, chosen):
    with torch.no_grad(), tp.prune(model, chosen, image_tokens=IMAGE, strict=True) as opened:
        model(IDS)
    return opened


WRITES = {
    "active": lambda self, tokens: tokens.active.zero_(),
    "exists": lambda self, tokens: tokens.exists.logical_not_(),
    "mass": lambda self, tokens: tokens.mass.mul_(2),
    "origin": lambda self, tokens: tokens.origin.add_(1),
    "target": lambda self, tokens: tokens.target.fill_(2),
    "attention": lambda self, tokens: tokens.attention.sub_(tokens.attention.mean()),
    "hidden": lambda self, tokens: tokens.hidden[:, 0].zero_(),  # through a view
    "embeddings": lambda self, tokens: tokens.embeddings.detach().mul_(0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_what_is_lent_is_named_and_the_model_is_as_before(model, name):
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(PluginError) as caught:
            run(model, strategy(WRITES[name]))
        assert str(caught.value).startswith(
            f"strategy 'borrower', stage 'prune': choose() modified tokens.{name} in place; tensors of Tokens are"
        )
        assert torch.equal(model(IDS).logits, before)
        assert run(model, tp.strategy("fastv")).trace.stages


@pytest.mark.parametrize("name", ["active", "exists", "mass", "origin", "target"])
def test_without_strict_mode_a_write_does_not_reach_the_prefill(model, name):
    def kept(act):
        with torch.no_grad(), tp.prune(model, strategy(act), image_tokens=IMAGE) as opened:
            logits = model(IDS).logits
        trace = opened.trace
        return logits, [trace.active(layer) for layer in range(4)], trace.stages[0].mass, trace.stages[0].origin

    (expected, *states), (found, *others) = kept(lambda self, tokens: None), kept(WRITES[name])
    assert torch.equal(found, expected)
    for state, other in zip(states[0] + states[1:], others[0] + others[1:], strict=True):
        assert torch.equal(state, other)


def test_a_part_of_a_composition_is_held_to_it_too(model):
    def halve(self, tokens):
        tokens.attention.mul_(0.5)

    with pytest.raises(PluginError, match=r"choose\(\) modified tokens.attention in place"):
        run(model, tp.Sequence(tp.strategy("uniform", keep=0.9), strategy(halve)))


def test_a_run_holds_nothing_that_it_lent(model):
    lent = []

    def note(self, tokens):
        tokens.memory["mine"] = tokens.hidden
        lent.extend(weakref.ref(value) for value in (tokens.attention, tokens.hidden, tokens.embeddings))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = run(model, strategy(note))
    gc.collect()
    assert len(lent) == 3
    assert [reference() for reference in lent] == [None] * 3
    assert opened.trace.stages


def keep(self, tokens):
    self.kept = tokens.hidden


def keep_a_view(self, tokens):
    self.kept = tokens.attention[0]


@pytest.mark.parametrize(
    ("act", "kept"),
    [
        (keep, r"tokens.hidden \(float32 \[2, 6, 32\], 1536 bytes\)"),
        (keep_a_view, r"tokens.attention \(float32 \[2, 6\]"),
    ],
)
def test_keeping_what_is_lent_is_told_once(model, act, kept):
    chosen = strategy(act)
    with pytest.warns(PluginWarning, match=r"strategy 'borrower', stage 'prune': " + kept + ".* is still held after"):
        run(model, chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, chosen)


def test_an_observer_that_keeps_decisions_is_told(model):
    class Hoarder:
        decisions = ()

        @tp.hookimpl
        def tokenprune_decision_taken(self, decision):
            self.decisions = (*self.decisions, decision)

    class Plain(Strategy):
        name = "plain"

        def stages(self, shape):
            return [Stage("prune", 2, None, AttentionFrom("last"))]

        def choose(self, stage, tokens):
            return Keep.top(tokens.attention, 3)

    registry.register_plugin(Hoarder(), name="hoarder")
    try:
        with pytest.warns(PluginWarning, match=r"tokens.attention .* by the strategy or an observer"):
            run(model, Plain())
    finally:
        registry.unregister_plugin("hoarder")


def test_cycles_of_references_are_not_kept(model):
    def tie(self, tokens):
        knot = [tokens.hidden]
        knot.append(knot)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, strategy(tie))


def test_inference_mode_runs_without_the_check(model):
    def write(self, tokens):
        tokens.hidden.zero_()

    with torch.inference_mode(), tp.prune(model, strategy(write), image_tokens=IMAGE, strict=True) as opened:
        model(IDS)
    assert len(opened.trace.stages) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["random", "uniform", "csp", "fastv", "similarity", "tome", "pyramiddrop"])
def test_built_in_strategies_write_to_nothing_and_keep_nothing(model, name):
    assert run(tiny_llama(8), tp.strategy(name)).trace.stages


def test_a_parked_token_comes_back_as_it_was(model):
    class Parking(Strategy):
        name = "parking"

        def stages(self, shape):
            return [Stage("park", 1), Stage("back", 2, None, HiddenStates())]

        def choose(self, stage, tokens):
            if stage.name == "park":
                return Keep.top(torch.arange(6.0).expand(2, 6).contiguous(), 3, rest="park")
            return Restore.where(tokens.parked, values=tokens.hidden)

    assert run(model, Parking()).trace.stages[-1].active.all()
