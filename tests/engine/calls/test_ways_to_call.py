"""Ways to call or handle a model under a context that are no plain prefill: right, or refused by their own names."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from vlm_families import CURRENT, FAMILIES

import tokenprune as tp
from tokenprune.engine import open_run
from tokenprune.errors import PruningWarning, UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

IDS = torch.arange(24).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:10] = True
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PRUNING = tp.strategy("fastv", layer=1, keep=4)


def gradients(model: Any, strategy: Any | None) -> dict[str, torch.Tensor]:
    """Of a loss, for every weight."""
    model.train()
    model.zero_grad()
    if strategy is None:
        model(input_ids=IDS, labels=IDS).loss.backward()
    else:
        with tp.prune(model, strategy, image_tokens=IMAGE) as run:
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert len(run.trace.ledger.entries) == len(model.model.layers)
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_where_nothing_is_pruned(reentrant: bool) -> None:
    model = tiny_llama()
    expected = gradients(model, None)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, tp.strategy("none"))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_the_model_are_refused_where_anything_is_pruned(reentrant: bool) -> None:
    """They would run it again in the backward pass, unpruned if the context is closed by then."""
    model = tiny_llama()
    embeds = model.get_input_embeddings()(IDS)

    def run() -> torch.Tensor:
        found: torch.Tensor = checkpoint(lambda x: model(inputs_embeds=x).logits, embeds, use_reentrant=reentrant)
        return found

    expected = run().detach()
    with tp.prune(model, PRUNING, image_tokens=IMAGE):
        with pytest.raises(UnsupportedError, match=r"torch\.utils\.checkpoint found around the model"):
            run()
        pruned = model(inputs_embeds=embeds).logits
        embeds = embeds.detach()
        with torch.no_grad():  # there is no backward pass
            assert torch.equal(run(), pruned)
    with tp.prune(model, tp.strategy("none"), image_tokens=IMAGE):
        embeds = model.get_input_embeddings()(IDS)
        assert torch.equal(run(), expected)


def test_flex_attention_is_refused_by_its_name() -> None:
    model = tiny_llama(heads=2, attention="flex_attention")
    # its kernel is compiled otherwise, for which there may be no compiler
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(IDS).logits
        with tp.prune(model, tp.strategy("none"), image_tokens=IMAGE):
            assert torch.equal(model(IDS).logits, expected)
        with (
            pytest.raises(UnsupportedError, match=r"'flex_attention' takes masks of type BlockMask.*set_attn_impl"),
            tp.prune(model, PRUNING, image_tokens=IMAGE),
        ):
            model(IDS)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("given", ["argument", "config", "of the model"])
def test_prompts_in_parts_are_refused(given: str) -> None:
    model = tiny_llama()
    parts, config = {}, copy.deepcopy(model.generation_config)
    if given == "argument":
        parts["prefill_chunk_size"] = 5
    elif given == "config":
        config.prefill_chunk_size = 5
        parts["generation_config"] = config
    else:
        model.generation_config.prefill_chunk_size = 5
    with (
        tp.prune(model, PRUNING, image_tokens=IMAGE),
        pytest.raises(UnsupportedError, match="prefill_chunk_size=5 is not supported under"),
    ):
        model.generate(IDS, **parts, **GREEDY)
    model.generate(IDS, **parts, **GREEDY)  # outside, it is nobody's business


@pytest.mark.skipif(not CURRENT, reason="older releases of transformers do not give pictures in parts")
def test_prompts_with_pictures_in_parts_are_refused() -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs([(30, 30)])
    with (
        tp.prune(model, PRUNING),
        pytest.raises(UnsupportedError, match="prefill_chunk_size=20 is not supported under"),
    ):
        model.generate(**inputs, prefill_chunk_size=20, max_new_tokens=2)
    assert "generate" not in model.__dict__


def test_copies_made_under_a_context_are_refused() -> None:
    """Their calls would go on being pruned when the context is closed, by a run of another model."""
    for model in (tiny_llama(), FAMILIES["llava"].build()):
        marks = {"image_tokens": IMAGE} if model.config.model_type == "llama" else {}
        with tp.prune(model, PRUNING, **marks):
            with pytest.raises(UnsupportedError, match="cannot be copied or pickled under"):
                copy.deepcopy(model)
            with pytest.raises(UnsupportedError, match="cannot be copied or pickled under"):
                pickle.dumps(model)
        copied = copy.deepcopy(model)
        assert "generate" not in copied.__dict__


# the context itself --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*never entered")
def test_what_is_asked_of_a_context_that_was_not_entered_is_refused() -> None:
    context = tp.prune(tiny_llama(), PRUNING, image_tokens=IMAGE)
    for ask in (lambda: context.trace, lambda: context.strategy):  # type: ignore[attr-defined]
        with pytest.raises(UnsupportedError, match=r"has no '(trace|strategy)'.* write `with tokenprune\.prune"):
            ask()
    assert not hasattr(context, "args")


def test_a_context_that_is_never_entered_says_so() -> None:
    with pytest.warns(PruningWarning, match=r"never entered, so nothing was pruned; write `with tokenprune"):
        tp.prune(tiny_llama(), PRUNING, image_tokens=IMAGE)


def test_a_context_opens_once() -> None:
    model = tiny_llama()
    context = tp.prune(model, PRUNING, image_tokens=IMAGE)
    with torch.no_grad(), context as run:
        model(input_ids=IDS)
        with pytest.raises(UnsupportedError, match="a context opens once, so call prune"):
            context.__enter__()
        assert run.trace.stages
    with pytest.raises(UnsupportedError, match="a context opens once, so call prune"), context:
        pass
    assert "forward" not in vars(model.model)


def test_as_a_decorator_every_call_is_pruned_anew() -> None:
    model = tiny_llama()

    @tp.prune(model, PRUNING, image_tokens=IMAGE)
    def states() -> torch.Tensor:
        return model(input_ids=IDS).logits

    with torch.no_grad():
        with tp.prune(model, PRUNING, image_tokens=IMAGE):
            expected = model(input_ids=IDS).logits
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        for _ in range(2):
            assert torch.equal(states(), expected)
        assert not torch.equal(model(input_ids=IDS).logits, expected)


def test_the_open_context_is_that_of_this_threads_calls() -> None:
    model = tiny_llama()
    assert open_run(model) is None
    with tp.prune(model, PRUNING, image_tokens=IMAGE, threads="own") as run:
        assert open_run(model) is open_run(model.model) is run
        assert open_run(tiny_llama()) is None
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(open_run, model).result() is None
    assert open_run(model) is None
    with pytest.raises(ZeroDivisionError), tp.prune(model, PRUNING, image_tokens=IMAGE):
        1 / 0  # noqa: B018
    assert open_run(model) is None
