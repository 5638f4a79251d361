"""Rows that begin with the same tokens: the prefix is computed once, and the result is that of whole rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bare_decoder import BareDecoder, rows_of_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import LAYERS, MODELS, WIDTH, empty_cache

from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import PromptMasks, prune, shared_prefill
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

NO_STAGE = Scripted([])


class Case:
    """Rows with a common prefix that contains the image, and texts of their own behind it.

    Attributes:
        common: columns of the prefix.
    """

    def __init__(self, seed, batch, padding):
        draw = torch.Generator().manual_seed(seed)
        self.common = int(torch.randint(3, 10, (1,), generator=draw))
        image = torch.rand(self.common, generator=draw) < 0.6
        image[0] = False
        own = [int(torch.randint(1, 5, (1,), generator=draw)) for _ in range(batch)]
        if padding == "none":
            own = own[:1] * batch
        length = self.common + max(own)
        self.embeds = torch.randn(batch, length, WIDTH, generator=draw)
        prefix = torch.randn(self.common, WIDTH, generator=draw)
        images, valid = torch.zeros(2, batch, length, dtype=torch.bool)
        for row, text in enumerate(own):
            start = length - self.common - text if padding == "left" else 0
            self.embeds[row, start : start + self.common] = prefix
            images[row, start : start + self.common] = image
            valid[row, start : start + self.common + text] = True
        self.ids = (valid.long().cumsum(1) - 1).clamp(min=0)
        self.layout = SequenceLayout.from_mask(images, valid)
        self.padded = padding != "none"

    def bound(self, model, shared):
        """The model, whose rows are said to begin with `shared` common columns."""
        return BareDecoder(model, PromptMasks(self.layout.image_tokens, shared=shared))

    def run(self, model, script, shared, **kwargs):
        """The output, the trace, and how many rows each layer was called with."""
        with (
            rows_of_calls(model.model.layers) as rows,
            torch.no_grad(),
            prune(self.bound(model, shared), script) as run,
        ):
            output = model.model(
                inputs_embeds=self.embeds,
                attention_mask=self.layout.valid.long() if self.padded else None,
                position_ids=self.ids if self.padded else None,
                **kwargs,
            )
        return output, run.trace, rows

    def same_in_all_rows(self, script):
        """A script for one row, for all rows."""
        batch = len(self.embeds)

        def repeated(decision):
            parts = {name: getattr(decision, name, None) for name in ("index", "values", "weights")}
            parts = {name: part.expand(batch, *part.shape[1:]) for name, part in parts.items() if part is not None}
            return replace(decision, **parts)

        steps = [Step(step.layer, repeated(step.decision), step.positions) for step in script.steps]
        return Scripted(steps, positions=script.positions)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 10**6),
    st.integers(2, 4),
    st.sampled_from(["none", "left", "right"]),
    st.sampled_from(["keep", "renumber"]),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_oracle(kind, seed, batch, padding, positions, same, cached):
    model, case = MODELS[kind], Case(seed, batch, padding)
    exists = case.layout.slots >= 0
    script = random_script(exists[:1] if same else exists, LAYERS, WIDTH, seed, positions=positions)
    if same:
        script = case.same_in_all_rows(script)
    output, trace, rows = case.run(model, script, case.common, use_cache=cached)
    expected = masked_full_length(model.model, case.embeds, case.layout, script, case.ids)
    assert (output.last_hidden_state - expected)[case.layout.valid].abs().max() < 2e-5
    whole, other, alone = case.run(model, script, 0, use_cache=cached)
    assert trace.ledger.entries == other.ledger.entries
    assert rows == [[1, batch]] * LAYERS if same else rows[0] in ([1, batch], [batch])
    assert alone == [[batch]] * LAYERS
    if cached:
        for layer in range(LAYERS):
            ours, theirs = (made.past_key_values.layers[layer] for made in (output, whole))
            frame = getattr(ours, "frame", None)
            filled = case.layout.valid if frame is None else frame.filled
            for name in ("keys", "values"):
                one, two = (getattr(own, name).transpose(1, 2)[filled] for own in (ours, theirs))
                assert (one - two).abs().max() < 2e-5


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_fill_a_static_cache_are_computed_whole(seed):
    model, case = MODELS["sdpa", 2], Case(seed, 3, "left")
    script = case.same_in_all_rows(random_script(case.layout.slots[:1] >= 0, LAYERS, WIDTH, seed))
    cache = empty_cache("static", model, case.embeds.shape[1] + 2)
    output, _, rows = case.run(model, script, case.common, past_key_values=cache)
    expected = masked_full_length(model.model, case.embeds, case.layout, script, case.ids)
    assert (output.last_hidden_state - expected)[case.layout.valid].abs().max() < 2e-5
    assert rows == [[3]] * LAYERS


def test_rows_that_differ_are_computed_whole():
    case = Case(3, 3, "none")
    case.embeds[1, 0] += 1
    _, _, rows = case.run(MODELS["sdpa", 4], NO_STAGE, case.common)
    assert rows == [[3]] * LAYERS


def test_sharing_ends_where_a_stage_chooses_by_the_text():
    case = Case(8, 2, "none")
    layout = case.layout
    assert layout.counts[0] >= 2
    kept = torch.zeros_like(layout.slots, dtype=torch.bool)
    kept[0, 0] = kept[1, 1] = True
    _, _, rows = case.run(MODELS["sdpa", 4], Scripted([Step(2, Keep.where(kept))]), case.common)
    assert rows == [[1, 2], [1, 2], [2], [2]]


class ByText(Strategy):
    """Keeps the image token that the last token attends to most."""

    name = "by text"

    def stages(self, shape):
        return [Stage("one", 2, reads=(AttentionFrom("last"),))]

    def choose(self, stage, tokens):
        return Keep.where(tokens.active & (tokens.read(AttentionFrom("last")).mean(1) > 0.1))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_layer_whose_attention_is_read_sees_whole_rows(padding):
    case, model = Case(5, 3, padding), MODELS["eager", 4]
    shared, trace, rows = case.run(model, ByText(), case.common)
    whole, other, _ = case.run(model, ByText(), 0)
    assert rows[0] == [1, 3]
    assert torch.equal(trace.active(3), other.active(3))
    valid = case.layout.valid
    assert (shared.last_hidden_state - whole.last_hidden_state)[valid].abs().max() < 2e-5


def test_equal_prompts_keep_a_column_of_their_own():
    case = Case(2, 2, "none")
    case.embeds[1] = case.embeds[0]
    output, _, rows = case.run(MODELS["sdpa", 4], NO_STAGE, case.embeds.shape[1])
    assert rows == [[1, 2]] * LAYERS
    assert (output.last_hidden_state[0] - output.last_hidden_state[1]).abs().max() < 2e-5


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_an_unpruned_prefill_and_what_follows(kind, padding):
    model, case = MODELS[kind], Case(7, 3, padding)
    new = torch.randn(3, 1, WIDTH)

    def run():
        mask = case.layout.valid.long() if case.padded else None
        ids = case.ids if case.padded else None
        first = model.model(inputs_embeds=case.embeds, attention_mask=mask, position_ids=ids, use_cache=True)
        if padding == "right":
            return [first.last_hidden_state]
        step = (
            {"attention_mask": torch.cat((mask, mask[:, -1:]), 1), "position_ids": ids[:, -1:] + 1}
            if case.padded
            else {}
        )
        second = model.model(inputs_embeds=new, past_key_values=first.past_key_values, **step)
        return [first.last_hidden_state, second.last_hidden_state]

    with torch.no_grad():
        expected = run()
        with shared_prefill(model, case.common, case.layout.valid), rows_of_calls(model.model.layers) as rows:
            found = run()
        whole = run()
    assert rows == [[1, 3, 3] if padding != "right" else [1, 3]] * LAYERS
    valid = case.layout.valid
    assert (found[0] - expected[0])[valid].abs().max() < 2e-5
    assert all((one - two).abs().max() < 2e-5 for one, two in zip(found[1:], expected[1:], strict=True))
    assert torch.equal(whole[0], expected[0])


def test_a_compiled_decoder_is_left_alone():
    case, model = Case(7, 2, "none"), tiny_llama(LAYERS)
    model.model.layers[1].compile(backend="eager")
    with (
        torch.no_grad(),
        rows_of_calls(model.model.layers) as rows,
        shared_prefill(model, case.common, case.layout.valid),
    ):
        model.model(inputs_embeds=case.embeds)
    assert rows == [[2]] * LAYERS


def see_everything(case):
    """A mask with which image tokens see the text behind them, as in models with bidirectional prompts."""
    length = case.embeds.shape[1]
    return torch.ones(len(case.embeds), 1, length, length, dtype=torch.bool)


def test_a_prefix_that_sees_the_text_is_not_shared():
    case, model = Case(4, 2, "none"), MODELS["sdpa", 4]
    with rows_of_calls(model.model.layers) as rows, torch.no_grad():
        expected = model.model(inputs_embeds=case.embeds, attention_mask=see_everything(case)).last_hidden_state
        with prune(case.bound(model, case.common), NO_STAGE):
            found = model.model(inputs_embeds=case.embeds, attention_mask=see_everything(case)).last_hidden_state
    assert rows == [[2, 2]] * LAYERS
    assert torch.equal(found, expected)


def test_not_with_gradients_or_hooks():
    case, model = Case(6, 2, "none"), MODELS["sdpa", 4]
    inputs = {"inputs_embeds": case.embeds}
    bound = case.bound(model, case.common)
    with rows_of_calls(model.model.layers) as rows, prune(bound, NO_STAGE):
        model.model(**inputs)
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
        with torch.no_grad():
            model.model(**inputs)
        handle.remove()
    assert rows == [[2, 2]] * LAYERS
