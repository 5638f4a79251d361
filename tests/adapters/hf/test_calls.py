"""The ways in which a vision-language model is called: guidance, embeddings, tuples, padding, later turns."""

from __future__ import annotations

import copy

import pytest
import torch
from vlm_cases import LAYERS, TOLERANCE, inputs_of, layout_of, model_of, names, script_of
from vlm_families import FAMILIES, READABLE, generates_otherwise
from vlm_known import MROPE
from vlm_oracle import oracle

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import TowerFeatures
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step

GREEDY = {"max_new_tokens": 4, "do_sample": False}


class EverySecond(Strategy):
    """The same tokens whatever the states, so that recomputation prunes alike."""

    name = "every-second"

    def __init__(self, layer=1, reads=()):
        super().__init__()
        self._stage = Stage("thin", layer, reads=reads)

    def stages(self, shape):
        return [self._stage]

    def choose(self, stage, tokens):
        for read in stage.reads:
            tokens.read(read)
        return Keep.where(tokens.exists & (torch.arange(tokens.exists.shape[1]) % 2 == 0))


def every_second(layout):
    """What `EverySecond` decides, for the oracle."""
    exists = layout.slots >= 0
    return Scripted([Step(1, Keep.where(exists & (torch.arange(exists.shape[1]) % 2 == 0)))])


@names
def test_guidance_prunes_the_prompt_and_leaves_its_second_stream_alone(name):
    """The unconditional stream starts from the prompt's last token, in a cache of its own, between prompt and step."""
    if name == "janus":
        pytest.skip("janus itself takes no guidance when it generates text")
    model, inputs = model_of(name), inputs_of(name)
    scale, strategy = 1.5, EverySecond()
    layout = layout_of(name, inputs)
    script = every_second(layout)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        with oracle(FAMILIES[name].decoder(model), layout, script):
            prompt = model(**inputs, use_cache=False).logits[:, -1].log_softmax(-1)
        untouched = model(**inputs, use_cache=False).logits[:, -1].log_softmax(-1)
        try:
            guided = model.generate(**inputs, guidance_scale=scale, **settings).scores[0]
        except RuntimeError as error:
            pytest.skip(f"{name} itself cannot be guided in this release of transformers: {error}")
        alone = (scale * untouched - guided) / (scale - 1)  # as transformers itself runs the second stream
        with tokenprune.prune(model, strategy) as run:
            got = model.generate(**inputs, guidance_scale=scale, **settings)
        assert run.trace.layout.image_tokens.any()
    shown = got.scores[0] > -1e30
    expected = scale * (prompt - alone) + alone
    assert (got.scores[0] - expected)[shown].abs().max() < 10 * TOLERANCE
    assert len(got.scores) == 4


@names
def test_hidden_states_equal_the_oracles(name):
    """With a stage before the first layer too, where models of DeepStack add features between the layers."""
    inputs = inputs_of(name)
    layout = layout_of(name, inputs)
    script = script_of(name, inputs, seed=4)
    model = copy.deepcopy(model_of(name))
    with torch.no_grad():
        with oracle(FAMILIES[name].decoder(model), layout, script):
            expected = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        model = copy.deepcopy(model_of(name))
        for _ in range(2):  # the second time transformers' hooks are there already
            with tokenprune.prune(model, script):
                got = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            assert len(got) == len(expected) == LAYERS + 1
            for mine, oracles in zip(got[1:], expected[1:], strict=True):
                assert mine.shape == oracles.shape
                assert (mine - oracles)[layout.valid].abs().max() < TOLERANCE


@names
def test_tuples_of_features_are_what_they_were(name):
    model, inputs = model_of(name), inputs_of(name)
    base, reads = model.base_model, (TowerFeatures(),) if name in READABLE else ()
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    given = {key: value for key, value in given.items() if "token_type" not in key}
    with torch.no_grad():
        expected = base.get_image_features(**given, return_dict=False)
        with tokenprune.prune(model, EverySecond(reads=reads)):
            got = base.get_image_features(**given, return_dict=False)
    assert isinstance(expected, tuple)
    flat = [[part for part in parts if isinstance(part, torch.Tensor)] for parts in (got, expected)]
    assert len(got) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*flat, strict=True))


@names
def test_embeddings_with_pixels_and_without_ids(name):
    """The placeholders are found among the embeddings, as the model itself finds them."""
    model, inputs = model_of(name), dict(inputs_of(name))
    with torch.no_grad():
        with tokenprune.prune(model, EverySecond()) as run:
            expected = model(**inputs).logits
        kept = run.trace.stages[0].kept
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids)
        try:
            untouched = model(inputs_embeds=embeds, **inputs).logits
        except Exception as error:
            pytest.skip(f"{name} itself does not take embeddings with pixels: {type(error).__name__}")
        whole = model(input_ids=ids, **inputs).logits
        if not torch.allclose(untouched, whole, atol=1e-4):
            pytest.skip(f"{name} itself computes something else from embeddings (positions need the ids)")
        with tokenprune.prune(model, EverySecond()) as run:
            got = model(inputs_embeds=embeds, **inputs).logits
    assert run.trace.stages[0].kept == kept
    assert (got - expected)[run.trace.layout.valid].abs().max() < TOLERANCE


def test_embeddings_alone_are_refused_by_name():
    model, inputs = model_of("llava"), inputs_of("llava")
    with torch.no_grad(), tokenprune.prune(model, EverySecond()), pytest.raises(InputError, match="without input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


@pytest.mark.parametrize("name", ["llava", "smolvlm", "paligemma"])
def test_placeholders_under_padding_are_padding(name):
    """A mask that hides some of a row's image tokens: they are never active, and the others are pruned as alone."""
    model, inputs = model_of(name), dict(inputs_of(name))
    image = FAMILIES[name].image_tokens(inputs)
    first = image.float().argmax(1)
    mask = inputs["attention_mask"].clone()
    for row, start in enumerate(first.tolist()):
        mask[row, : start + 2] = 0  # left padding that reaches into the image
    inputs["attention_mask"] = mask
    with torch.no_grad():
        with tokenprune.prune(model, EverySecond()) as run:
            got = model(**inputs).logits
        layout = run.trace.layout
        assert not (layout.image_tokens & ~layout.valid).any()
        assert torch.equal(layout.image_tokens, image & mask.bool())
        with oracle(FAMILIES[name].decoder(model), layout, every_second(layout)):
            expected = model(**inputs, use_cache=False).logits
    assert (got - expected)[layout.valid].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_images_of_two_turns_are_pruned_as_in_one_run(name):
    """Equal to recomputation without a cache, in which each image loses every second token of its own."""
    model = model_of(name)
    both = FAMILIES[name].inputs([[(24, 32), (32, 24)]], seed=3)
    layout = layout_of(name, both)
    second = layout.image_number[0] == 1
    cut = int(second.float().argmax())
    while bool(FAMILIES[name].image_tokens(both)[0, cut - 1]) or (name.startswith("qwen") and _starts(both, cut - 1)):
        cut -= 1
    turns = _split(name, both, cut)
    number = layout.gather_slots(layout.image_number)
    place = torch.arange(number.shape[1])
    own = torch.where(number == 0, place, place - int((number == 0).sum()))
    with torch.no_grad():
        with oracle(FAMILIES[name].decoder(model), layout, Scripted([Step(1, Keep.where(own % 2 == 0))])):
            expected = model(**both, use_cache=False).logits[:, cut:]
        with tokenprune.prune(model, EverySecond()) as run:
            cache = model(**turns[0], use_cache=True).past_key_values
            first = run.trace
            got = model(**turns[1], past_key_values=cache).logits
    assert (got - expected).abs().max() < TOLERANCE
    assert run.trace is not first
    assert run.trace.ledger.image_tokens == (int(second.sum()),)
    assert run.trace.ledger.other_tokens == (both["input_ids"].shape[1] - cut - int(second.sum()),)


def _starts(inputs, place):
    from vlm_configs import START

    return int(inputs["input_ids"][0, place]) == START


def _split(name, inputs, cut):
    """Two calls: everything before the second image, and the rest."""
    ids = inputs["input_ids"]
    first = {"input_ids": ids[:, :cut], "attention_mask": inputs["attention_mask"][:, :cut]}
    rest = {"input_ids": ids[:, cut:], "attention_mask": inputs["attention_mask"]}
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        grids = inputs["image_grid_thw"]
        patches = int(grids[0].prod())
        first |= {"pixel_values": pixels[:patches], "image_grid_thw": grids[:1]}
        rest |= {"pixel_values": pixels[patches:], "image_grid_thw": grids[1:]}
        model = model_of(name)
        given = {"input_ids": ids, "image_grid_thw": grids, "attention_mask": inputs["attention_mask"]}
        if "mm_token_type_ids" in inputs:
            given["mm_token_type_ids"] = inputs["mm_token_type_ids"]
        positions, _ = model.base_model.get_rope_index(**given)
        first["position_ids"], rest["position_ids"] = positions[..., :cut], positions[..., cut:]
        if "mm_token_type_ids" in inputs:
            first["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :cut]
            rest["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, cut:]
    else:
        half = len(pixels) // 2
        first["pixel_values"], rest["pixel_values"] = pixels[:half], pixels[half:]
    return first, rest


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_a_model_that_assists_itself_is_refused_by_that_name(name):
    model, inputs = model_of(name), inputs_of(name, sizes=((24, 32),))
    with (
        torch.no_grad(),
        tokenprune.prune(model, EverySecond()),
        pytest.raises(UnsupportedError, match="assistant_model is not supported under"),
    ):
        model.generate(**inputs, **GREEDY, assistant_model=model)


@names
def test_generation_from_embeddings_with_pixels(name):
    """`generate` may encode the pixels ahead, and hands on embeddings and what the tower gave."""
    model, inputs = model_of(name), dict(inputs_of(name))
    with torch.no_grad():
        with tokenprune.prune(model, EverySecond()) as run:
            expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        kept = run.trace.stages[0].kept
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        try:
            model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
        except Exception as error:
            pytest.skip(f"{name} itself does not generate from embeddings with pixels: {type(error).__name__}")
        with tokenprune.prune(model, EverySecond()) as run:
            got = model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
    assert run.trace.stages[0].kept == kept
    if not name.startswith(MROPE):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_what_a_model_keeps_of_its_latest_conversation_is_there_afterwards(name):
    model, inputs = model_of(name), inputs_of(name)
    with torch.no_grad():
        model(**inputs)
        expected = model.base_model.rope_deltas
        model.base_model.rope_deltas = None
        with tokenprune.prune(model, EverySecond()):
            model(**inputs)
    assert torch.equal(model.base_model.rope_deltas, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_conversation_is_known_by_its_cache_wherever_it_stands_among_the_arguments(name):
    base, inputs = model_of(name).base_model, inputs_of(name)
    other = FAMILIES[name].inputs([(60, 30)] * len(inputs["input_ids"]))  # another size: positions of its own
    token = torch.full((len(inputs["input_ids"]), 1), 5)
    with torch.no_grad():
        with tokenprune.prune(base, EverySecond()):
            cache = base(**inputs, use_cache=True).past_key_values
            expected = base(token, past_key_values=cache).last_hidden_state
        for step in (lambda cache: base(token, None, None, cache), lambda cache: base(token, past_key_values=cache)):
            with tokenprune.prune(base, EverySecond()):
                cache = base(**inputs, use_cache=True).past_key_values
                base(**other, use_cache=True)
                assert torch.equal(step(cache).last_hidden_state, expected)


@names
def test_beam_search_equals_recomputation(name):
    if name == "llama4":
        pytest.skip("llama4 itself does not repeat its images for several sequences: ValueError")
    if reason := generates_otherwise(name, {"use_cache": False}):
        pytest.skip(reason)
    model, inputs = model_of(name), inputs_of(name)
    settings = {**GREEDY, "num_beams": 2}
    with torch.no_grad():
        with tokenprune.prune(model, EverySecond()):
            got = model.generate(**inputs, **settings)
        with tokenprune.prune(model, EverySecond()):
            expected = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(got, expected)
