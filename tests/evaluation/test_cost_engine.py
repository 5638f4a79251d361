"""The exact convention against what PyTorch counts on pruned runs through the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import tokenprune
from tokenprune.core.decisions import Decision, Keep, Merge
from tokenprune.core.ledger import Ledger
from tokenprune.core.reads import AttentionFrom, HiddenStates, Read
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.cost import ChoiceMeter, DecoderSpec, count_flops, measure_flops

WIDTH, LAYERS = 64, 4


class Scheduled(Strategy):
    """The first tokens, by a list of (layer, share of the image tokens), with or without reading attention."""

    name = "scheduled"

    def __init__(self, steps: list[tuple[int, float]], scored: bool) -> None:
        super().__init__()
        self.steps, self.scored = steps, scored

    def stages(self, shape: Shape) -> Iterator[Stage]:
        for layer, share in self.steps:
            reads: tuple[Read, ...] = (AttentionFrom("rows"),) if self.scored and layer else ()
            yield Stage(f"at {layer}", layer, int(share * shape.image_tokens), reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        if stage.reads:
            return Keep.top(tokens.attention, tokens.target)
        order = tokens.active.long().cumsum(1)
        return Keep.where(tokens.active & (order <= tokens.target[:, None]))


class Pooled(Strategy):
    """All tokens become their mean after one layer, by similarities that nobody needs."""

    name = "pooled"

    def stages(self, shape: Shape) -> Iterator[Stage]:
        yield Stage("pool", 1, 1, (HiddenStates(),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        hidden = tokens.hidden
        alike = hidden @ hidden.transpose(1, 2)
        weights = tokens.active.float()[:, None] / tokens.counts[:, None, None]
        return Merge(torch.zeros(len(hidden), 1, dtype=torch.int64), weights=weights, scores=alike.sum(1))


def llama(kv_heads: int, attention: str, head: bool) -> LlamaForCausalLM | LlamaModel:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return (LlamaForCausalLM if head else LlamaModel)(config).eval()


steps = st.lists(st.integers(0, LAYERS - 1), unique=True, min_size=1, max_size=3).flatmap(
    lambda layers: st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), min_size=len(layers), max_size=len(layers)).map(
        lambda shares: list(zip(sorted(layers), sorted(shares, reverse=True), strict=True))
    )
)


@settings(max_examples=30, deadline=None)
@given(
    steps=steps,
    scored=st.booleans(),
    kv_heads=st.sampled_from([4, 2, 1]),
    attention=st.sampled_from(["sdpa", "eager"]),
    head=st.booleans(),
    image=st.lists(st.integers(4, 20), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    left=st.booleans(),
)
def test_exact_equals_flop_counter_pruned(
    steps: list[tuple[int, float]],
    scored: bool,
    kv_heads: int,
    attention: str,
    head: bool,
    image: list[int],
    rows: int,
    left: bool,
) -> None:
    model = llama(kv_heads, attention, head)
    text, width = 6, 6 + max(image)
    marks, valid = torch.zeros(2, len(image), width, dtype=torch.bool)
    queries = torch.zeros(len(image), width, dtype=torch.bool)
    for row, count in enumerate(image):
        start = width - text - count if left else 0
        valid[row, start : start + text + count] = True
        marks[row, start + 2 : start + 2 + count] = True
        queries[row, start + 2 + count : start + 2 + count + rows] = True
    x = torch.randn(len(image), width, WIDTH)
    with tokenprune.prune(model, Scheduled(steps, scored), image_tokens=marks, queries={"rows": queries}) as run:
        counted = measure_flops(model, inputs_embeds=x, attention_mask=valid.long())
    ours = count_flops(run.trace.ledger, DecoderSpec.from_config(model.config), logit_positions=width if head else 0)
    assert ours.total == counted
    assert (ours.scorer > 0) == (scored and any(layer for layer, _ in steps))


def _prefill(strategy: Strategy, image: int = 64, text: int = 9) -> tuple[Ledger, int, DecoderSpec]:
    model = llama(2, "sdpa", head=False)
    marks = torch.zeros(1, image + text, dtype=torch.bool)
    marks[:, 3 : 3 + image] = True
    with tokenprune.prune(model, strategy, image_tokens=marks) as run:
        counted = measure_flops(model, inputs_embeds=torch.randn(1, image + text, WIDTH))
    return run.trace.ledger, counted, DecoderSpec.from_config(model.config)


@pytest.mark.parametrize("name", ["none", "blind", "random", "uniform", "fastv", "pyramiddrop"])
def test_declared_ledger_costs_what_the_run_costs(name: str) -> None:
    strategy = tokenprune.strategy(name)
    ledger, counted, spec = _prefill(strategy)
    declared = count_flops(declared_ledger(strategy, Shape(LAYERS, 64, 9)), spec)
    assert declared == count_flops(ledger, spec)
    assert declared.total == counted
    assert ledger.unpruned() == _prefill(tokenprune.strategy("none"))[0].unpruned()


def test_merges_and_a_strategys_own_matmuls_are_measured() -> None:
    meter = ChoiceMeter(Pooled(), Shape(LAYERS, 64, 9))
    ledger, counted, spec = _prefill(meter.strategy)
    assert meter.flops == 2 * 64 * 64 * WIDTH
    ours = count_flops(ledger, spec, fixed={"strategy": meter.flops})
    assert ours.merge == 2 * 64 * WIDTH
    assert ours.total == counted
