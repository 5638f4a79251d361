"""What users and plugins can do wrong, and what the model looks like afterwards."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from model_state import state
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.reads import AttentionFrom, TowerFeatures
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine import prune
from tokenprune.errors import EngineError, IncompatibleError, InputError, PluginError, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama


class Choosing(Strategy):
    """A strategy made of one function, at one layer."""

    name = "choosing"

    def __init__(self, choose, layer=2, tokens=None, reads=()):
        super().__init__()
        self._choose, self._stage = choose, Stage("only", layer, tokens, reads)

    def stages(self, shape):
        return [self._stage]

    def choose(self, stage, tokens):
        return self._choose(tokens)


def half(tokens):
    return Keep.top(tokens.attention, tokens.count(0.5))


FASTV_LIKE = {"reads": AttentionFrom("last")}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(4)


@pytest.fixture(scope="module")
def inputs():
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:8] = True
    return torch.arange(24).reshape(2, 12), image


def boom(tokens):
    raise ValueError("no such thing")


def index(values, **kwargs):
    return lambda tokens: Keep(torch.tensor(values), **kwargs)


MISBEHAVING = {
    "raises": (boom, "raised ValueError: no such thing"),
    "not a decision": (lambda t: [0, 1], "returned list"),
    "base decision": (lambda t: Decision(torch.tensor([[0], [0]])), "returned Decision"),
    "out of range": (index([[0, 6], [0, 1]]), "out of range: 6"),
    "negative": (index([[0, -2], [0, 1]]), "out of range: -2"),
    "unsorted": (index([[3, 1], [0, 1]]), "unsorted"),
    "duplicate": (index([[1, 1], [0, 1]]), "twice"),
    "duplicate apart": (index([[1, 3, 1], [0, 1, 2]]), "twice"),
    "padding in front": (index([[-1, 1], [0, 1]]), "padding"),
    "float index": (index([[0.0], [1.0]]), "torch.float32"),
    "wrong batch": (index([[0]]), "[1, 1]"),
    "another device": (lambda t: Keep(torch.zeros(2, 1, dtype=torch.long, device="meta")), "on meta"),
    "NaN scores": (lambda t: Keep.top(torch.full((2, 6), float("nan")), 2), "NaN among the scores"),
    "scores of wrong shape": (lambda t: Keep(torch.tensor([[0], [1]]), scores=torch.zeros(2, 3)), "scores of shape"),
    "NaN values": (
        lambda t: Keep(torch.tensor([[0], [1]]), values=torch.full((2, 1, 32), float("nan"))),
        "NaN or infinity",
    ),
    "values of wrong width": (lambda t: Keep(torch.tensor([[0], [1]]), values=torch.zeros(2, 1, 8)), "values of shape"),
    "restores active": (lambda t: Restore(torch.tensor([[0], [1]])), "not parked"),
    "unknown rest": (lambda t: Keep(torch.tensor([[0], [1]]), rest="burn"), "rest='burn'"),
    "merge that loses mass": (
        lambda t: Merge(torch.tensor([[0], [0]]), weights=torch.ones(2, 1, 6) / 6, conserves_mass=True),
        "conserves mass",
    ),
    "merge of wrong shape": (
        lambda t: Merge(torch.tensor([[0], [0]]), weights=torch.ones(2, 1, 5)),
        "weights of shape",
    ),
    "undeclared read": (lambda t: Keep.top(t.hidden.sum(-1), 2), "without declaring"),
}


@pytest.mark.parametrize("case", sorted(MISBEHAVING))
def test_a_misbehaving_strategy_is_named_and_the_model_restored(model, inputs, case):
    ids, image = inputs
    choose, message = MISBEHAVING[case]
    before = state(model)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(PluginError) as caught, prune(model, Choosing(choose, **FASTV_LIKE), image_tokens=image):
            model(ids)
        assert message in str(caught.value)
        assert "choosing" in str(caught.value) or "'only'" in str(caught.value)
        assert state(model) == before
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Choosing(half, layer=4, **FASTV_LIKE), "the model has 4 layers"),
        (Choosing(half, layer=0, **FASTV_LIKE), "layer before layer 0"),
        (Choosing(half, tokens=7, **FASTV_LIKE), "declares 7 tokens of 6"),
        (Choosing(half, tokens=2, **FASTV_LIKE), "the 2 that the stage declared"),
    ],
)
def test_declarations_that_cannot_hold(model, inputs, strategy, message):
    before = state(model)
    with pytest.raises(PluginError, match=message), prune(model, strategy, image_tokens=inputs[1]):
        model(inputs[0])
    assert state(model) == before


def test_reads_that_the_model_cannot_provide_are_refused_before_anything_runs(model, inputs):
    ran = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *a: ran.append(1))
    with (
        pytest.raises(
            IncompatibleError, match="'choosing' is incompatible with model 'LlamaForCausalLM': requires TowerFeatures"
        ),
        prune(model, Choosing(half, reads=TowerFeatures()), image_tokens=inputs[1]),
    ):
        model(inputs[0])
    hook.remove()
    assert not ran


def test_nothing_is_left_after_a_normal_run_and_after_an_exception_of_the_user(model, inputs):
    before = state(model)
    with prune(model, Choosing(half, **FASTV_LIKE), image_tokens=inputs[1]) as run:
        model(inputs[0])
        assert state(model) != before
    assert state(model) == before
    assert run.trace.stages[0].active.sum(1).tolist() == [3, 3]
    with pytest.raises(KeyError), prune(model, Choosing(half, **FASTV_LIKE), image_tokens=inputs[1]):
        raise KeyError
    assert state(model) == before


def test_an_error_inside_the_context_can_be_caught_and_the_model_called_again(model, inputs):
    ids, image = inputs
    answers = iter([boom, half])
    with torch.no_grad(), prune(model, Choosing(lambda t: next(answers)(t), **FASTV_LIKE), image_tokens=image) as run:
        with pytest.raises(PluginError):
            model(ids)
        model(ids)
        assert len(run.trace.stages) == 1


def test_a_closed_run_keeps_no_hidden_states(model, inputs):
    embeds = torch.randn(2, 12, 32)
    with torch.no_grad(), prune(model, Choosing(half, **FASTV_LIKE), image_tokens=inputs[1]) as run:
        held = weakref.ref(model.model(inputs_embeds=embeds).last_hidden_state)
    gc.collect()
    assert held() is None
    assert run.trace.stages


def test_the_callers_tensors_are_not_written_to(model, inputs):
    embeds = torch.randn(2, 12, 32)
    kept = embeds.clone()
    merge = Choosing(lambda t: Merge(torch.tensor([[0], [3]]), weights=torch.full((2, 1, 6), 1 / 6)), layer=0)
    with torch.no_grad(), prune(model, merge, image_tokens=inputs[1]):
        model.model(inputs_embeds=embeds)
    assert torch.equal(embeds, kept)


def test_nesting_on_one_model_is_refused(model, inputs):
    before = state(model)
    with prune(model, Choosing(half, **FASTV_LIKE), image_tokens=inputs[1]):
        with (
            pytest.raises(UnsupportedError, match="do not nest"),
            prune(model.model, Choosing(half), image_tokens=inputs[1]),
        ):
            pass
        model(inputs[0])
    assert state(model) == before


def test_two_models_of_one_config_in_two_threads(inputs):
    first = tiny_llama(4, seed=1)
    second = type(first)(first.config).eval()
    ids, image = inputs
    runs = {}
    alone = {}
    for name, model in (("first", first), ("second", second)):
        with torch.no_grad(), prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image):
            alone[name] = model(ids).logits

    def work(name, model):
        out = []
        for _ in range(15):
            with torch.no_grad(), prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image):
                out.append(model(ids).logits)
        runs[name] = out

    threads = [threading.Thread(target=work, args=pair) for pair in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("first", "second"):
        assert len(runs[name]) == 15
        assert all(torch.equal(logits, alone[name]) for logits in runs[name])


def test_generate_positions_are_right_where_layer_0_ran_on_few_tokens(model, inputs):
    """Greedy tokens with a cache equal greedy tokens by recomputation, also from a stage at layer 0."""
    ids, image = inputs
    few = Choosing(lambda t: Keep.where(t.exists & (torch.arange(6) < 1)), layer=0)
    out = {}
    for cached in (True, False):
        with torch.no_grad(), prune(model, few, image_tokens=image):
            out[cached] = model.generate(
                ids, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None
            )
    assert torch.equal(out[True], out[False])
    assert out[True].shape == (2, 18)


def test_several_samples(model, inputs):
    ids, image = inputs
    before = state(model)
    with prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image):
        out = model.generate(ids, max_new_tokens=4, num_return_sequences=3, do_sample=True, pad_token_id=0)
    assert len(out) == 6
    assert state(model) == before


def test_caches_of_other_kinds_or_with_tokens_inside_are_refused(model, inputs):
    ids, image = inputs

    class OtherLayer(DynamicLayer):
        """Of another package."""

    other = Cache(layers=[OtherLayer() for _ in model.model.layers])
    with torch.no_grad():
        with (
            pytest.raises(UnsupportedError, match="KV cache of type OtherLayer is not supported"),
            prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image),
        ):
            model(ids, past_key_values=other)
        used = DynamicCache(config=model.config)
        model(ids, past_key_values=used)
        with (
            pytest.raises(UnsupportedError, match="already contains tokens"),
            prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image),
        ):
            model(ids, past_key_values=used)


def test_a_pruned_cache_is_refused_outside_its_context(model, inputs):
    ids, image = inputs
    with torch.no_grad():
        with prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image):
            cache = model(ids, use_cache=True).past_key_values
        assert cache.layers[3].keys.shape[2] == 9
        assert cache.get_seq_length() == 12
        with pytest.raises(UnsupportedError, match="context is closed"):
            model(ids[:, :1], past_key_values=cache)


def test_rows_without_tokens_and_missing_masks(inputs):
    ids, image = inputs
    model = tiny_llama(2)
    everything = torch.ones_like(image)
    with (
        pytest.raises(EngineError, match="left a batch row without tokens"),
        prune(model, Choosing(lambda t: Keep.where(torch.zeros_like(t.exists)), layer=1), image_tokens=everything),
    ):
        model(ids)
    with pytest.raises(InputError, match="image_tokens"), prune(model, Choosing(half)):
        pass
    with (
        pytest.raises(InputError, match="cover the expanded prompt"),
        prune(model, Choosing(half), image_tokens=torch.ones(2, 30).bool()),
    ):
        model(ids)
    with pytest.raises(EngineError, match="no prefill"), prune(model, Choosing(half), image_tokens=image) as run:
        _ = run.trace


def test_a_row_without_image_tokens_runs_beside_one_with(model):
    ids = torch.arange(24).reshape(2, 12)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:8] = True
    with torch.no_grad(), prune(model, Choosing(half, **FASTV_LIKE), image_tokens=image) as run:
        out = model(ids).logits
        plain = model
    with torch.no_grad():
        assert torch.allclose(out[1], plain(ids[1:]).logits[0], atol=1e-5)
    assert run.trace.ledger.entries[3].image == (3, 0)


def test_padding_of_one_call_is_not_that_of_the_next(model):
    """The decoder inside may be called alone after the whole model, in one context."""
    ids, image = torch.arange(1, 13)[None], torch.zeros(1, 12, dtype=torch.bool)
    image[:, 4:8] = True
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :2] = 0
    half = Keep.where(torch.tensor([[True, False, True, False]]))
    with torch.no_grad(), prune(model, Scripted([Step(1, half)]), image_tokens=image) as run:
        model(ids, attention_mask=mask)
        assert run.trace.layout.valid.sum() == 10
        model.model(ids)
        assert run.trace.layout.valid.all()
