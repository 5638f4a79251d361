"""Training under a schedule: gradients are the oracle's, with gradient checkpointing of both kinds and without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cases import LAYERS, MODELS, WIDTH, random_layout
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vlm_families import CURRENT, FAMILIES

import tokenprune as tp
from tokenprune.errors import UnsupportedError
from tokenprune.testing.kit.recording import Log, Watched
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import Scripted, random_script
from tokenprune.testing.tiny_decoders import tiny_llama

IDS = torch.arange(1, 25).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:10] = True
FASTV = {"layer": 1, "keep": 4}
INSIDE = "__call__" not in vars(type(tiny_llama(1).model.layers[0]).__mro__[1])  # checkpoints, of the layers' forward
KINDS = [None, False, True]  # no checkpoints; use_reentrant


@contextmanager
def training(model: Any, reentrant: bool | None) -> Iterator[None]:
    """Training mode, with checkpoints of that kind or without."""
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newest releases have another name for it
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
            model.eval()


def gradients(model: nn.Module, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a loss, for all weights that it depends on, and these inputs."""
    for leaf in (*model.parameters(), *inputs):
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in (*model.parameters(), *inputs) if leaf.grad is not None]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        difference = float((one - other).abs().max())
        assert difference <= tolerance * max(1.0, float(other.abs().max()))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from(["none", "left", "right"]),
    st.sampled_from(["keep", "renumber"]),
)
def test_gradients_of_random_schedules_are_the_oracles(
    kind: tuple[str, int], seed: int, batch: int, padding: str, positions: str
) -> None:
    """Through gather, scatter, park, restore, merge; with checkpoints they are those without."""
    model = MODELS[kind]
    layout, ids = random_layout(seed, batch, padding)
    draw = torch.Generator().manual_seed(seed)
    embeds = torch.randn(*layout.valid.shape, WIDTH, generator=draw).requires_grad_()
    probe = torch.randn(*layout.valid.shape, WIDTH, generator=draw) * layout.valid[..., None]
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed, positions=positions)
    inputs = {"inputs_embeds": embeds}
    if padding != "none":
        inputs |= {"attention_mask": layout.valid.long(), "position_ids": ids}
    found = []
    for reentrant in KINDS:
        with training(model, reentrant), tp.prune(model, script, image_tokens=layout.image_tokens):
            states = model.model(**inputs).last_hidden_state
            found.append(gradients(model, (states * probe).sum(), embeds))
    states = masked_full_length(model.model, embeds, layout, script, ids)
    assert_close(found[0], gradients(model, (states * probe).sum(), embeds))
    for others in found[1:]:
        assert_close(others, found[0], 5e-6)


# every kind of strategy, on the bundled model ------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 2, "keep": 0.25},
    "csp": {"budget": 0.3},
    "prumerge+": {"budget": 0.25},  # renumbers, and merges
    "dart": {"layer": 2, "keep": 0.25},
    "pyramiddrop": {},
    "sparsevlm": {"budget": 0.4},
}


@pytest.fixture(scope="module")
def lisa() -> Any:
    return tp.load("lisa-tiny")


@pytest.fixture(scope="module")
def prompts(lisa: Any) -> Any:
    """Two rows of different lengths."""
    image = (np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8)
    with torch.no_grad():
        return lisa.build_inputs(image, ["the red ring", "the star that is left of the large blue square"])


def _detached(decision: Any) -> Any:
    return replace(decision, values=decision.values.detach())


SLOW = ("dart", "pyramiddrop")  # which drop, as fastv does


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in STRATEGIES])
def test_gradients_under_strategies_are_the_oracles(name: str, lisa: Any, prompts: Any) -> None:
    decoder, sequence = lisa.decoder.model, prompts.sequence
    valid = sequence.attention_mask.bool()
    probe = torch.randn(*valid.shape, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    probe = probe * valid[..., None] / valid.sum()
    found, log, choices = [], Log(), []
    for reentrant in KINDS:
        strategy = Watched(tp.strategy(name, **STRATEGIES[name]), log)
        log.steps.clear()
        with training(lisa.decoder, reentrant):
            lisa.decoder.enable_input_require_grads()
            prompts.sequence.inputs_embeds.requires_grad_()
            states, trace = lisa.run_decoder(prompts, strategy)  # the context is closed by the backward pass
            found.append(gradients(decoder, (states * probe).sum()))
            lisa.decoder.disable_input_require_grads()
        choices.append(len(log.steps))
        assert trace.ledger.equivalent_tokens < 0.75 * sequence.image_tokens.sum(1).max()
    assert choices[0] == choices[1] == choices[2] > 0
    # values that a strategy merges before the first layer are of no weight of the decoder
    steps = [
        step if step.decision.values is None else replace(step, decision=_detached(step.decision)) for step in log.steps
    ]
    script = Scripted(steps, positions=strategy.positions)
    ids = torch.arange(valid.shape[1]).expand(len(valid), -1) if sequence.positions is None else sequence.positions
    states = masked_full_length(decoder, sequence.inputs_embeds, trace.layout, script, ids)
    assert_close(found[0], gradients(decoder, (states * probe).sum()), 2e-5)
    for others in found[1:]:
        assert_close(others, found[0], 5e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_on_top_of_checkpoints(reentrant: bool) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = []
    for checkpoints in (None, reentrant):
        with training(model.base_model.model, checkpoints):
            model.enable_input_require_grads()
            with tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE):
                loss = model(input_ids=IDS, labels=IDS).loss
            found.append(gradients(model, loss))
    assert len(found[0]) == 2 * 2 * 4
    assert_close(*found, 5e-6)


@pytest.mark.skipif(not CURRENT, reason="transformers' own VLMs need a newer release")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["fastv", "similarity"])
def test_vision_language_models_with_checkpoints_in_tower_and_decoder(family: str, name: str, reentrant: bool) -> None:
    case = FAMILIES[family]
    model, inputs = case.build(), case.inputs([(30, 30)])
    strategy = tp.strategy(name, **({"layer": 1, "keep": 0.5} if name == "fastv" else {"budget": 0.5}))
    found = []
    for checkpoints in (None, reentrant):
        with training(model, checkpoints):
            model.enable_input_require_grads()
            with tp.prune(model, strategy) as run:
                loss = model(**inputs, labels=inputs["input_ids"]).loss
            assert run.trace.ledger.equivalent_tokens < run.layout.counts.max()
            found.append(gradients(model, loss))
    assert_close(*found)


# the second run is only that ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_layers_that_run_again_decide_tell_and_count_nothing(
    reentrant: bool, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the context is open or closed by the backward pass, and with a later prefill in between."""
    model, log, told = tiny_llama(), Log(), []
    monkeypatch.setattr("tokenprune.engine.run.notify", lambda hook, **what: told.append(hook))
    runs = [0] * 4
    for number, layer in enumerate(model.model.layers):
        inner = layer.mlp.forward

        def counted(x: Tensor, number: int = number, inner: Any = inner) -> Tensor:
            runs[number] += 1
            return inner(x)

        layer.mlp.forward = counted
    with training(model, reentrant):
        model.enable_input_require_grads()
        with tp.prune(model, Watched(tp.strategy("fastv", **FASTV), log), image_tokens=IMAGE) as run:
            first = model(input_ids=IDS, labels=IDS).loss
            one = run.trace
            second = model(input_ids=IDS.flip(0), labels=IDS.flip(0)).loss
            entries = [repr(entry) for trace in (one, run.trace) for entry in trace.ledger.entries]
            if not closed:
                (first + second).backward()
        if closed:
            (first + second).backward()
    assert runs == [4] * 4  # twice in the forward passes, twice in the backward pass
    assert len(log.steps) == 2
    assert [told.count(hook) for hook in ("tokenprune_decision_taken", "tokenprune_prefill_done")] == [2, 2]
    assert [repr(entry) for trace in (one, run.trace) for entry in trace.ledger.entries] == entries
    assert len(entries) == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread(reentrant: bool) -> None:
    """As autograd does for devices other than the CPU."""
    model, found = tiny_llama(), []
    for checkpoints in (None, reentrant):
        with training(model, checkpoints):
            model.enable_input_require_grads()
            with tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE):
                loss = model(input_ids=IDS, labels=IDS).loss
                thread = Thread(target=lambda loss=loss: found.append(gradients(model, loss)))
                thread.start()
                thread.join()
    assert_close(*found, 5e-6)


def test_dropout_is_drawn_once() -> None:
    model = tiny_llama(attention_dropout=0.5)
    found = []
    for reentrant in KINDS:
        torch.manual_seed(0)
        with training(model, reentrant), tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE):
            found.append(gradients(model, model(input_ids=IDS, labels=IDS).loss))
    for others in found[1:]:
        assert_close(others, found[0], 5e-6)


# what layers have no more -------------------------------------------------------------------------------------------


def test_checkpointed_layers_fill_no_cache() -> None:
    model = tiny_llama()
    with training(model, False), tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE):
        model.eval()  # in which nothing is checkpointed
        filled = model(input_ids=IDS, use_cache=True).past_key_values
        model.train()
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        assert cache is None or cache.get_seq_length() == 0
        with pytest.raises(UnsupportedError, match=r"^generate\(\) found with gradient checkpointing"):
            model.generate(IDS, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(UnsupportedError, match=r"^a filled KV cache found with gradient checkpointing"):
            model(input_ids=IDS[:, :1], past_key_values=filled)
        model.eval()
        assert model(input_ids=IDS[:, :1], past_key_values=filled).logits.shape[1] == 1
        assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape[1] == 14


def test_checkpoints_that_come_too_late_are_refused_or_right() -> None:
    """Where the release puts them around the layer's forward, only those before the context are within it."""
    model = tiny_llama()
    with (
        tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE),
        training(model, False),
        nullcontext() if INSIDE else pytest.raises(UnsupportedError, match=r"enable\(\) before"),
    ):
        model(input_ids=IDS, labels=IDS).loss.backward()


def test_every_other_layer_may_be_checkpointed() -> None:
    model, strategy = tiny_llama(), tp.strategy("fastv", **FASTV)
    found = []
    for some in ((), (0, 2), (1, 3)):
        with training(model, False):
            for number, layer in enumerate(model.model.layers):
                layer.gradient_checkpointing = number in some
            model.model.gradient_checkpointing = False
            with tp.prune(model, strategy, image_tokens=IMAGE):
                output = model(input_ids=IDS, labels=IDS, use_cache=True)
            assert output.past_key_values.get_seq_length() == (0 if some else 12)
            found.append(gradients(model, output.loss))
    for others in found[1:]:
        assert_close(others, found[0], 5e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_a_later_layer_are_refused(reentrant: bool) -> None:
    """A decoder of one's own may hand any of its layers to a checkpoint, which would come to the engine again."""
    model = tiny_llama()
    third = type(model.model.layers[2])

    class Handed(third):  # type: ignore[misc, valid-type]
        def __call__(self, hidden: Tensor, **kwargs: Any) -> Any:
            call = super().__call__
            return checkpoint(lambda states: call(states, **kwargs), hidden, use_reentrant=reentrant)

    model.model.layers[2].__class__ = Handed
    with (
        tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE),
        pytest.raises(UnsupportedError, match=r"found around the model or a layer of it.*gradient_checkpointing_enab"),
    ):
        model(input_ids=IDS)


def test_hooks_see_the_whole_sequence_once_or_are_refused() -> None:
    """Releases of transformers with the checkpoint around the hooks would show them the remaining tokens, twice."""
    model, strategy, shapes = tiny_llama(), tp.strategy("fastv", **FASTV), []
    handle = model.model.layers[2].register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    with training(model, False), tp.prune(model, strategy, image_tokens=IMAGE):
        with nullcontext() if INSIDE else pytest.raises(UnsupportedError, match="hooks on decoder layers"):
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert len(shapes) == 1
            assert 12 in shapes[0]
        handle.remove()
        with nullcontext() if INSIDE else pytest.raises(UnsupportedError, match="output_hidden_states"):
            states = model(input_ids=IDS, output_hidden_states=True).hidden_states
            assert [state.shape[1] for state in states] == [12] * 5


def test_models_are_left_as_they_were() -> None:
    model = tiny_llama()
    with training(model, False):
        before = [dict(vars(layer)) for layer in model.model.layers]
        with tp.prune(model, tp.strategy("fastv", **FASTV), image_tokens=IMAGE):
            model(input_ids=IDS)
        for layer, values in zip(model.model.layers, before, strict=True):
            assert vars(layer) == values
