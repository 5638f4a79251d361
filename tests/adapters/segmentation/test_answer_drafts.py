"""Answer drafts: one forward checks an expected answer; text, states and masks are those of decoding step by step."""

from __future__ import annotations

import random

import pytest
import torch
from bare_decoder import BareDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import LAYERS, MODELS, WIDTH, random_layout
from segmentation_golden import difference

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom, TextKeys, TextStates
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import PromptMasks, prune
from tokenprune.errors import InputError, OptionError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import random_script
from tokenprune_adapters.llava.draft import with_drafts
from tokenprune_adapters.llava.prompt import DecoderInputs
from tokenprune_adapters.segmentation.drafts import ANSWERS, TEMPLATES, TOKENS, AnswerDrafts, template_of
from tokenprune_adapters.segmentation.generation import generate

NO_END = (10**6,)  # an id outside the vocabulary


def prompts(model, layout, ids, seed):
    """Random prompts of a layout that is padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=draw)
    none = torch.zeros_like(layout.valid)
    return DecoderInputs(
        embeds, layout.valid.long(), torch.zeros_like(ids), layout.image_tokens, none, none.clone(), positions=ids
    )


def decode(model, inputs, script, expect, steps, drafts=None):
    sequence = with_drafts(inputs, drafts, model.get_input_embeddings()) if drafts else inputs
    masks = PromptMasks(sequence.image_tokens, drafted=sequence.drafted)
    with torch.no_grad(), prune(BareDecoder(model, masks), script) as run:
        return generate(model, sequence, steps, NO_END, expect), run.trace


def corrupted(answer, draw):
    """An answer with a few wrong tokens, cut or too long."""
    wrong = [token if draw.random() < 0.75 else draw.randrange(64) for token in answer]
    return (wrong + [draw.randrange(64) for _ in range(3)])[: draw.randrange(len(answer) + 4)]


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from(["none", "left"]),
    st.sampled_from(["keep", "renumber"]),
    st.integers(1, 7),
)
def test_any_draft_gives_what_decoding_gives(kind, seed, batch, padding, positions, steps):
    model, draw = MODELS[kind], random.Random(seed)
    layout, ids = random_layout(seed, batch, padding)
    inputs = prompts(model, layout, ids, seed)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    plain, plain_trace = decode(model, inputs, script, lambda row, said: [], steps)
    drafts = [corrupted(answer, draw)[: steps - 1] for answer in plain.ids]
    later = {row: corrupted(answer, draw) for row, answer in enumerate(plain.ids)}
    drafted, trace = decode(model, inputs, script, lambda row, said: later[row][len(said) :], steps, drafts)

    assert drafted.ids == plain.ids
    assert difference(drafted.states, plain.states) < 2e-5
    assert trace.ledger.other_tokens == plain_trace.ledger.other_tokens
    assert [entry.image for entry in trace.ledger.entries] == [entry.image for entry in plain_trace.ledger.entries]

    # the definition: all tokens at full length, with masks
    said = torch.tensor([answer[:-1] for answer in drafted.ids], dtype=torch.long).reshape(batch, steps - 1)
    embeds = torch.cat([inputs.inputs_embeds, model.get_input_embeddings()(said)], 1)
    more = torch.ones_like(said, dtype=torch.bool)
    whole = SequenceLayout.from_mask(
        torch.cat([layout.image_tokens, ~more], 1), torch.cat([layout.valid, more], 1).long()
    )
    places = torch.cat([ids, ids[:, -1:] + 1 + torch.arange(steps - 1)], 1)
    with torch.no_grad():
        states = masked_full_length(model.model, embeds, whole, script, places)[:, -steps:]
        chosen = model.lm_head(states).argmax(-1)
    assert difference(drafted.states, states) < 2e-5
    assert chosen.tolist() == drafted.ids


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_a_right_draft_needs_one_forward(seed, steps):
    model = MODELS["sdpa", 2]
    layout, ids = random_layout(seed, 2, "left")
    inputs = prompts(model, layout, ids, seed)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed)
    plain, _ = decode(model, inputs, script, lambda row, said: [], steps)
    drafts = [answer[:-1] for answer in plain.ids]
    drafted, _ = decode(model, inputs, script, lambda row, said: [], steps, drafts)
    assert (plain.forwards, drafted.forwards) == (steps, 1)
    assert drafted.ids == plain.ids


class Reader(Strategy):
    """Records what it reads of the text."""

    name = "reader"

    def __init__(self):
        super().__init__()
        self.seen = []

    def stages(self, shape):
        self.shape = shape
        return [Stage("one", 2, reads=(AttentionFrom("last"), TextStates(), TextKeys()))]

    def choose(self, stage, tokens):
        self.seen = [tokens.read(AttentionFrom("last")), tokens.read(TextStates()), tokens.read(TextKeys())]
        return Keep.where(tokens.active)


def test_a_draft_is_hidden_from_strategies():
    model = MODELS["eager", 4]
    layout, ids = random_layout(7, 3, "left")
    inputs = prompts(model, layout, ids, 7)
    plain, drafted = Reader(), Reader()
    decode(model, inputs, plain, lambda row, said: [], 4)
    decode(model, inputs, drafted, lambda row, said: [], 4, [[1, 2, 3], [4], []])
    assert drafted.shape == plain.shape
    for found, wanted in zip(drafted.seen, plain.seen, strict=True):
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5)


STRATEGIES = (None, "csp", "fastv", "pyramiddrop", "sparsevlm", "visionzip")
DRAFTS = (True, "[SEG].", ["Sure, it is [SEG].", "[SEG]"], "other words")


@pytest.fixture(scope="module")
def lisa():
    return tp.load("lisa-tiny")


@pytest.fixture(scope="module")
def scene():
    return next(iter(tp.dataset("shapes").scenes("val")))


@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_of_lisa_tiny_are_those_without_a_draft(lisa, scene, name):
    strategy = None if name is None else tp.strategy(name, budget=0.4)
    queries, encoded = [query.text for query in scene.queries][:3], lisa.encode_image(scene.image)
    plain = lisa.segment(encoded, queries, strategy, answer="generate", draft=False, max_new_tokens=6)
    for draft in DRAFTS:
        found = lisa.segment(encoded, queries, strategy, answer="generate", draft=draft, max_new_tokens=6)
        assert found.text == plain.text
        assert difference(found.mask_logits, plain.mask_logits) < 1e-3
        assert torch.equal(found.masks, plain.masks)
        assert found.query_index == plain.query_index
        if strategy is not None:
            assert [stage.kept for stage in found.trace.stages] == [stage.kept for stage in plain.trace.stages]
            assert found.trace.ledger.other_tokens == plain.trace.ledger.other_tokens


def test_the_second_answer_of_a_template_needs_one_forward(lisa, scene):
    encoded = lisa.encode_image(scene.image)
    query = scene.queries[0].text
    inputs = lisa.inputs_of(lisa.prompts([query], "generate"), encoded, continues=True, queries=[query])
    lisa.__dict__.pop("drafts", None)  # forget
    with torch.inference_mode():
        first, _ = lisa.run_generation(inputs, max_new_tokens=8)
        second, _ = lisa.run_generation(inputs, max_new_tokens=8)
        without, _ = lisa.run_generation(inputs, max_new_tokens=8, draft=False)
    assert second.forwards == 1 < first.forwards <= without.forwards
    assert second.ids == first.ids == without.ids


def test_a_given_draft_is_tokenised_once(lisa, scene, monkeypatch):
    encoded, seen, encode = lisa.encode_image(scene.image), [], lisa.tokenizer.encode
    monkeypatch.setattr(lisa.tokenizer, "encode", lambda text, **options: seen.append(text) or encode(text, **options))
    lisa.segment(encoded, "the circle", answer="generate", draft="Sure, it is [SEG].", max_new_tokens=2)
    assert seen.count("Sure, it is [SEG].") == 1


def test_what_is_learnt_is_bounded_and_by_template():
    drafts = AnswerDrafts([[9, 9]])
    assert drafts.expect("a") == [9, 9]
    for _ in range(2):
        drafts.learn("a", [1, 2, 3])
    drafts.learn("a", [1, 4])
    assert drafts.expect("a") == [1, 2, 3]
    assert drafts.expect("a", [1, 4]) == []
    assert drafts.expect("a", [1]) == [2, 3]
    assert drafts.expect("b") == [9, 9]
    drafts.learn("a", list(range(1000)))
    assert drafts.expect("a", range(TOKENS - 1)) == [TOKENS - 1]
    for number in range(3 * max(ANSWERS, TEMPLATES)):
        drafts.learn("a", [5, number])
        drafts.learn(f"{number}", [1])
    assert len(drafts._learnt) <= TEMPLATES
    assert all(len(counts) <= ANSWERS for counts in drafts._learnt.values())


def test_template_of():
    assert template_of("What is the dog? ASSISTANT:", " the dog ") == "What is {}? ASSISTANT:"
    assert template_of("anything", None) is None


@pytest.mark.parametrize(
    ("draft", "error", "message"),
    [
        (3, OptionError, "draft=3 found, expected True, False, an answer, or a list of answers"),
        (b"x", OptionError, "draft="),
        ("", InputError, "draft is empty; pass draft=False to generate without one"),
        ([], InputError, "draft is an empty list, expected at least one string"),
        (["a", None], InputError, "draft is a NoneType, expected a string"),
    ],
)
def test_a_wrong_draft_is_refused(lisa, scene, draft, error, message):
    with pytest.raises(error, match=message):
        lisa.segment(scene.image, "the circle", answer="generate", draft=draft)
