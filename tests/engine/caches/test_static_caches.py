"""Static caches: slots, refusals, reuse, and `generate`, whose masks for them have four dimensions.

Decoding on them against the oracle is tested beside growing caches, in test_oracle.py and test_caches.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import LAYERS, MODELS, WIDTH, empty_cache, random_layout
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

import tokenprune as tp
from tokenprune.core.decisions import Keep, Restore
from tokenprune.engine import padding_mask, prune
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.errors import UnsupportedError
from tokenprune.testing.scripted import Scripted, Step, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

IDS = torch.arange(1, 25).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True
HALF = Keep.where(torch.tensor([[True, False, True, False, True, False]] * 2))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_llama(LAYERS)


def halved(layer=1, **options):
    return Scripted([Step(layer, HALF)], **options)


# generate ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 10**6), st.sampled_from(["keep", "renumber"]))
def test_generate_with_a_static_cache_gives_what_a_growing_one_gives(kind, seed, positions):
    model = MODELS[kind]
    layout, _ = random_layout(seed, 2, "left")
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    ids = torch.randint(1, 64, layout.valid.shape, generator=torch.Generator().manual_seed(seed))
    options = {"attention_mask": layout.valid.long(), "max_new_tokens": 4, **GREEDY}
    with prune(model, script, image_tokens=layout.image_tokens) as run:
        expected = model.generate(ids, **options)
        layouts = [run.trace.layout]
        got = model.generate(ids, cache_implementation="static", **options)
        layouts.append(run.trace.layout)
    assert torch.equal(got, expected)
    assert torch.equal(*[layout.valid for layout in layouts])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beam_search_with_a_static_cache(model, options):
    image, mask = IMAGE.clone(), torch.ones(2, 12, dtype=torch.long)
    image[1, :5], mask[1, :3] = False, 0
    options = {"attention_mask": mask, "max_new_tokens": 5, **GREEDY, **options}
    with prune(model, tp.strategy("pyramiddrop", budget=0.5, positions="renumber"), image_tokens=image):
        expected = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["fastv", "csp", "pyramiddrop", "dart", "sparsevlm"])
def test_strategies_read_the_same_of_a_static_cache(name, padded, attention):
    """Its empty slots are no keys of the prompt."""
    model = tiny_llama(6, attention=attention)
    ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    image, mask = torch.zeros(2, 24, dtype=torch.bool), torch.ones(2, 24, dtype=torch.long)
    image[:, 4:20] = True
    mask[1, : 3 if padded else 0] = 0
    chosen = []
    with prune(model, tp.strategy(name, budget=0.5), image_tokens=image) as run:
        for cache in (None, empty_cache("static", model, 40)):
            output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            chosen.append([(output.logits * mask[..., None], stage.active) for stage in run.trace.stages])
    for (logits, active), (others, others_active) in zip(*chosen, strict=True):
        assert torch.equal(active, others_active)
        assert (logits - others).abs().max() < 1e-5


def sliding(kind):
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.2}
    torch.manual_seed(0)
    if kind == "all":
        return MistralForCausalLM(MistralConfig(**options)).eval()
    layers = ["sliding_attention", "full_attention"] * 2
    return Qwen2ForCausalLM(Qwen2Config(use_sliding_window=True, layer_types=layers, **options)).eval()


@pytest.mark.parametrize("layer", range(4))
def test_sliding_windows_in_some_layers(layer):
    model = sliding("some")
    options = {"max_new_tokens": 8, **GREEDY}
    with prune(model, halved(layer), image_tokens=IMAGE):
        expected = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 3))
def test_padding_is_known_from_masks_of_four_dimensions(seed, side, additive, spare):
    valid = random_layout(seed, 3, side)[0].valid
    length = valid.shape[1]
    total = length + spare
    seen = torch.ones(length, total, dtype=torch.bool).tril()[None, None]
    seen = seen & torch.nn.functional.pad(valid, (0, spare))[:, None, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    found = padding_mask({"attention_mask": {"full_attention": mask}, "input_ids": torch.zeros(3, length)})
    assert torch.equal(found, valid)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["none", "2-D", "bool", "additive"]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_empty_slots_are_hidden_by_masks_of_every_kind(seed, kind, new, past, spare, two_d):
    layout, _ = random_layout(seed, 2, "left")
    length = layout.valid.shape[1]
    draw = torch.Generator().manual_seed(seed)
    frame = GatheredSequence.of(layout.valid & (~layout.image_tokens | (torch.rand(2, length, generator=draw) < 0.5)))
    real = torch.cat((layout.valid, torch.ones(2, past + new, dtype=torch.bool)), 1)
    seen = real[:, None, None] & torch.ones(new, real.shape[1], dtype=torch.bool).tril(length + past)
    masks = {"none": (None, None), "2-D": (real.long(), real.long())}
    masks["bool"] = seen, torch.nn.functional.pad(seen, (0, spare))
    masks["additive"] = [(~mask).float() * torch.finfo(torch.float32).min for mask in masks["bool"]]
    full, padded = masks[kind]
    expected = frame.decode_mask(full, new, past, two_d=two_d)
    found = frame.decode_mask(padded, new, past, past + new + spare, two_d=two_d)
    held = frame.width + past + new
    assert found.shape[-1] == held + spare
    if expected is None:
        expected = torch.ones_like(found[..., :held])
    assert torch.equal(found[..., :held], expected.expand_as(found[..., :held]))
    hidden = found[..., held:] < 0 if kind == "additive" else ~found[..., held:].bool()
    assert hidden.all()


# slots ---------------------------------------------------------------------------------------------------------------


def fail(original, *args, **kwargs):
    original(*args, **kwargs)
    raise ZeroDivisionError


def filled(model, length=16):
    return model(IDS, past_key_values=empty_cache("static", model, length)).past_key_values


def test_a_shortened_layer_has_fewer_slots(model):
    with prune(model, halved(2), image_tokens=IMAGE):
        cache = filled(model)
        assert [own.keys.shape[2] for own in cache.layers] == [16, 16, 13, 13]
        assert [own.get_seq_length() for own in cache.layers] == [12] * 4
        kept = [own.keys.data_ptr() for own in cache.layers]
        model(IDS[:, :2], past_key_values=cache)
        assert [own.get_seq_length() for own in cache.layers] == [14] * 4
        assert [own.keys.data_ptr() for own in cache.layers] == kept  # in place


@pytest.mark.parametrize("layer", [0, 2])
def test_a_full_cache_is_refused_and_keeps_what_it_has(model, layer):
    with prune(model, halved(layer), image_tokens=IMAGE):
        with pytest.raises(UnsupportedError, match="max_cache_len=11, but this call needs 12 tokens per row"):
            filled(model, 11)
        cache = filled(model, 14)
        expected = model(IDS[:, :2], past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(UnsupportedError, match=r"max_cache_len=14, but this call needs 15.*larger max_cache_len"):
            model(IDS[:, :3], past_key_values=cache)
        assert torch.equal(model(IDS[:, :2], past_key_values=cache).logits, expected)
        with pytest.raises(UnsupportedError, match="max_cache_len=14, but this call needs 15 tokens per row"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_step_that_failed_is_overwritten(model, layer):
    with prune(model, halved(), image_tokens=IMAGE):
        cache = filled(model)
        expected = model(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
        with shadowed(model.model.layers[layer].self_attn, "forward", fail), pytest.raises(ZeroDivisionError):
            model(IDS[:, 3:5], past_key_values=cache)
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("script", [Scripted([]), Scripted([Step(1, Keep.where(IMAGE[:, IMAGE.any(0)]))])])
def test_a_step_that_failed_in_layers_of_transformers_is_not_continued(model, layer, script):
    with prune(model, script, image_tokens=IMAGE):
        cache = filled(model)
        with shadowed(model.model.layers[layer].self_attn, "forward", fail), pytest.raises(ZeroDivisionError):
            model(IDS[:, 3:5], past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"StaticCache failed.*start with an empty cache"):
            model(IDS[:, 3:5], past_key_values=cache)
        cache.reset()
        again = model(IDS, past_key_values=cache).logits
        assert torch.equal(again, model(IDS, past_key_values=empty_cache("static", model, 40)).logits)


def test_a_prefill_that_failed_leaves_no_layer_filled_unseen(model):
    """Layer 0 lacks tokens, and layer 2 has all again; a retry must not append to it."""
    kept = HALF.index
    script = Scripted([Step(0, Keep(kept, rest="park")), Step(2, Restore(torch.tensor([[1, 3, 5]] * 2)))])
    with prune(model, script, image_tokens=IMAGE):
        cache = empty_cache("static", model, 40)
        with shadowed(model.model.layers[3].self_attn, "forward", fail), pytest.raises(ZeroDivisionError):
            model(IDS, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="start with an empty cache"):
            model(IDS, past_key_values=cache)


def test_a_cache_is_used_again_by_prefills_with_other_counts(model):
    draw = torch.Generator().manual_seed(0)
    cache = empty_cache("static", model, 20)
    for layer, length in ((1, 12), (0, 15), (3, 12)):
        ids = torch.randint(1, 64, (2, length), generator=draw)
        image = torch.zeros(2, length, dtype=torch.bool)
        image[:, 2:8] = True
        with prune(model, halved(layer, positions="renumber"), image_tokens=image):
            expected = model(ids, use_cache=True)
            cache.reset()
            got = model(ids, past_key_values=cache)
            assert (got.logits - expected.logits).abs().max() < 1e-5
            step = model(ids[:, :2], past_key_values=expected.past_key_values).logits
            assert (model(ids[:, :2], past_key_values=cache).logits - step).abs().max() < 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = model(IDS, use_cache=True).logits
    assert (model(IDS, past_key_values=cache).logits - expected).abs().max() < 1e-5
    assert cache.layers[0].keys.shape[2] == 20
    assert int(cache.get_seq_length()) == 12
    step = model(IDS[:, :1], past_key_values=model(IDS, use_cache=True).past_key_values).logits
    assert (model(IDS[:, :1], past_key_values=cache).logits - step).abs().max() < 1e-5


def test_what_is_not_pruned_leaves_the_cache_as_transformers_has_it(model):
    cache = empty_cache("static", model, 16)
    with prune(model, Scripted([]), image_tokens=IMAGE):
        model(IDS, past_key_values=cache)
        got = model(IDS[:, :1], past_key_values=cache).logits
    other = empty_cache("static", model, 16)
    model(IDS, past_key_values=other)
    assert torch.equal(model(IDS[:, :1], past_key_values=other).logits, got)
    assert {type(own) for own in cache.layers} == {type(own) for own in other.layers}


# what is refused -----------------------------------------------------------------------------------------------------


def test_a_cache_from_elsewhere_is_refused(model):
    cache = empty_cache("static", model, 16)
    model(IDS, past_key_values=cache)
    with prune(model, halved(), image_tokens=IMAGE):
        with pytest.raises(UnsupportedError, match="already contains tokens from outside this pruning context"):
            model(IDS[:, :1], past_key_values=cache)
        inside = filled(model)
    with pytest.raises(UnsupportedError, match="context is closed"):
        model(IDS[:, :1], past_key_values=inside)


@pytest.mark.parametrize("kind", ["sliding", "offloaded"])
def test_other_static_caches_are_refused(kind):
    model = sliding("all") if kind == "sliding" else tiny_llama(4)
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.offloading = kind == "offloaded"
    named = {"sliding": "type (Static)?SlidingWindowLayer", "offloaded": "type offloaded StaticLayer"}[kind]
    with (
        prune(model, halved(), image_tokens=IMAGE),
        pytest.raises(UnsupportedError, match=f"{named}.* expected a DynamicCache, or a StaticCache that is not"),
    ):
        model(IDS, past_key_values=cache)
