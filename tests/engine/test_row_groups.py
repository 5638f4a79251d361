"""Rows of one batch whose stages begin at different layers: each is what it is alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

import tokenprune as tp
from tokenprune import prune
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, Embeddings, HiddenStates, TowerFeatures
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.testing.kit import invariants
from tokenprune.testing.kit.cases import Case, Row
from tokenprune.testing.kit.recording import run
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH, NEW = 4, 32, 2
LLAMA = tiny_llama(LAYERS, kv_heads=2)


class BySize(Strategy):
    """A random script of its own for every number of image tokens, with a position policy at every stage."""

    name = "by-size"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def script(self, count: int) -> Scripted:
        exists = torch.ones(1, count, dtype=torch.bool)
        script = random_script(exists, LAYERS, WIDTH, self.seed + count)
        policies = ("keep", "renumber")
        steps = [replace(step, positions=policies[(self.seed + n) // 2 % 2]) for n, step in enumerate(script.steps)]
        return Scripted(steps)

    def stages(self, shape: Shape) -> Iterable[Stage]:
        count = shape.image_tokens  # in the names, so that equal layers of other sizes are another group
        return [replace(stage, name=f"{stage.name} of {count}") for stage in self.script(count).stages(shape)]

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """Rows of one group have one number of tokens here, and so one decision."""
        (count,) = {count for count in tokens.counts.tolist() if count}
        assert tokens.exists.shape[1] == count
        one = self.script(count).steps[int(stage.name.split()[0])].decision
        here = tokens.exists.any(1)
        shared = {
            name: value.expand(len(here), *value.shape[1:])
            for name in ("values", "weights")
            if (value := getattr(one, name, None)) is not None
        }
        return replace(one, index=torch.where(here[:, None], one.index, -1), **shared)


def batch_of(counts: list[int], padding: str, extra: int = 0) -> SequenceLayout:
    """Row r: two text tokens, `counts[r]` image tokens, three text tokens, and as many more as all rows have."""
    rows = [torch.tensor([0] * 2 + [1] * count + [0] * (3 + extra)) for count in counts]
    length = max(map(len, rows))
    around = [(length - len(row), 0) if padding == "left" else (0, length - len(row)) for row in rows]
    padded = torch.stack([pad(row, sides, value=-1) for row, sides in zip(rows, around, strict=True)])
    return SequenceLayout.from_mask(padded == 1, padded >= 0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.sampled_from(["left", "right"]), st.integers(0, 10**6))
def test_every_row_is_what_the_masked_oracle_makes_of_it_alone(counts: list[int], padding: str, seed: int) -> None:
    """Prefill and, where the padding is on the left, tokens decoded on the cache."""
    new = NEW if padding == "left" else 0
    prompt, longer = batch_of(counts, padding), batch_of(counts, padding, new)
    length, strategy = prompt.valid.shape[1], BySize(seed)
    embeds = torch.randn(*longer.valid.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    ids = (longer.valid.long().cumsum(1) - 1).clamp(min=0)
    found, cache = [], None
    with torch.no_grad(), prune(LLAMA, strategy, image_tokens=prompt.image_tokens) as pruning:
        for first, last in [(0, length), *((step, step + 1) for step in range(length, length + new))]:
            output = LLAMA.model(
                inputs_embeds=embeds[:, first:last],
                attention_mask=longer.valid[:, :last].long(),
                position_ids=ids[:, first:last],
                past_key_values=cache,
                use_cache=new > 0,
            )
            cache = output.past_key_values
            found.append(output.last_hidden_state)
    together = torch.cat(found, 1)
    for row, count in enumerate(counts):
        real, own = longer.valid[row], strategy.script(count)
        alone = SequenceLayout.from_mask(longer.image_tokens[row : row + 1, real])
        places = torch.arange(int(real.sum()))[None]
        expected = masked_full_length(LLAMA.model, embeds[row : row + 1, real], alone, own, places)
        assert (together[row, real] - expected[0]).abs().max() < 2e-5
        assert [stage.layer for stage in pruning.trace.stages_of(row)] == [step.layer for step in own.steps]
    for layer, entry in enumerate(pruning.trace.ledger.entries):
        assert list(entry.image) == pruning.trace.active(layer).sum(1).tolist()


class Remembering(Strategy):
    """Marks and notes something at one stage, and goes by it at a later one; layers go by the row's size."""

    name = "remembering"

    def stages(self, shape: Shape) -> Iterable[Stage]:
        first = 1 + shape.image_tokens % 3
        yield Stage("note", first, shape.image_tokens - 1, (AttentionFrom("last"), TowerFeatures(), Embeddings()))
        yield Stage("use", first + 2, shape.image_tokens // 2, (AttentionFrom("chosen"), HiddenStates()))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        if stage.name == "note":
            tokens.memory["scores"] = tokens.attention.exp() + tokens.features.sum(-1) + tokens.embeddings.sum(-1)
            last = tokens.text.sum(1, keepdim=True) - 2
            tokens.mark("chosen", torch.arange(tokens.text.shape[1]) == last)
            scores = tokens.memory["scores"]
        else:
            scores = tokens.memory["scores"] + 1e3 * tokens.attention.exp() + tokens.hidden.sum(-1)
        return Keep.top(scores.masked_fill(~tokens.active, float("-inf")), tokens.target)


SIZES = (((1, 2),), ((2, 2),), ((3, 3),), ((2, 3), (1, 2)), ((5, 5),))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_marks_memory_and_reads_belong_to_the_rows_of_a_stage(padding: str) -> None:
    rows = tuple(Row(images, 1 + number, 3, seed=number) for number, images in enumerate(SIZES))
    case = Case("llama", rows, padding)
    trace = run(case, Remembering()).trace
    assert len({tuple(stage.rows.tolist()) for stage in trace.stages if stage.rows is not None}) == 3
    invariants.row_equals_row_alone(case, Remembering())
    invariants.equals_oracle(case, Remembering())
    invariants.cached_equals_recomputed(case, Remembering())


NAMES = ["csp", "fastv", "similarity", "tome", "pyramiddrop", "dart", "knorm", "feather", "ivcprune"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_budgets_that_want_different_layers_run_together(name: str, padding: str) -> None:
    """At 0.6 rows of two tokens need an earlier stage than longer ones."""
    rows = tuple(Row((size,), 1, 2 + 3 * number, seed=number) for number, size in enumerate([(1, 2), (6, 6), (1, 2)]))
    case, strategy = Case("llama", rows, padding, 0.6), tp.strategy(name)
    trace = run(case, strategy).trace
    groups = {tuple(stage.rows.tolist()) for stage in trace.stages if stage.rows is not None}
    assert groups == {(True, False, True), (False, True, False)}
    invariants.row_equals_row_alone(case, strategy)
    invariants.equals_oracle(case, strategy)
    invariants.cached_equals_recomputed(case, strategy)
    invariants.budget_is_met(case, strategy, None)
