"""Calls of `generate`: what they may not ask for, which context they belong to, what the trace tells of them."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from meetings import PATIENCE, Stop, is_free, left_on, started
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from vlm_families import FAMILIES

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.engine.calls.call_stack import EarlierCalls
from tokenprune.errors import UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

IDS = torch.stack([torch.arange(1, 25), torch.arange(2, 26)])
IMAGE = torch.zeros(2, 24, dtype=torch.bool)
IMAGE[:, 4:20] = True
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class EverySecond(Strategy):
    """The same tokens whatever the states, so that recomputation prunes alike."""

    name = "every-second"

    def stages(self, shape: Any) -> list[Stage]:
        """One."""
        return [Stage("thin", 1)]

    def choose(self, stage: Stage, tokens: Any) -> Keep:
        """By number."""
        return Keep.where(tokens.exists & (torch.arange(tokens.exists.shape[1]) % 2 == 0))


@pytest.fixture
def model() -> Any:
    return tiny_llama(4)


# what is refused -----------------------------------------------------------------------------------------------------


def by_position(model: Any) -> Any:
    config = GenerationConfig(max_new_tokens=4, **PLAIN)
    return model.generate(IDS[:1], config, None, None, None, None, tiny_llama(1))


def by_name(model: Any) -> Any:
    return model.generate(IDS[:1], max_new_tokens=4, assistant_model=tiny_llama(1), **PLAIN)


def by_setting(name: str, value: int, where: str) -> Any:
    def call(model: Any) -> Any:
        config = GenerationConfig(max_new_tokens=4, **PLAIN)
        if where == "argument":
            return model.generate(IDS[:1], max_new_tokens=4, **PLAIN, **{name: value})
        setattr(model.generation_config if where.startswith("model") else config, name, value)
        if where == "model alone":
            return model.generate(IDS[:1], max_new_tokens=4, **PLAIN)
        return (
            model.generate(IDS[:1], config)
            if where == "position"
            else model.generate(IDS[:1], generation_config=config)
        )

    return call


WHERE = ["argument", "config", "position", "model", "model alone"]
LOOKUP = [("prompt_lookup_num_tokens", by_setting("prompt_lookup_num_tokens", 3, where)) for where in WHERE]
CHUNKS = [("prefill_chunk_size=10", by_setting("prefill_chunk_size", 10, where)) for where in WHERE]


@pytest.mark.parametrize(
    ("name", "call"), [("assistant_model", by_position), ("assistant_model", by_name), *LOOKUP, *CHUNKS]
)
def test_guesses_and_prompts_in_parts_are_refused_however_they_are_asked_for(model: Any, name: str, call: Any) -> None:
    before = left_on(model)
    with (
        torch.no_grad(),
        tp.prune(model, EverySecond(), image_tokens=IMAGE[:1]),
        pytest.raises(UnsupportedError, match=f"{name} is not supported under"),
    ):
        call(model)
    assert left_on(model) == before
    call(model)  # not refused for good


# which context a call belongs to -------------------------------------------------------------------------------------


class Stopping(LogitsProcessor):
    """Waits in the middle of a generation, once."""

    def __init__(self, after: int) -> None:
        self.stop, self._left = Stop(), after

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Changes nothing."""
        self._left -= 1
        if not self._left:
            self.stop()
        return scores


def said(model: Any, inputs: dict[str, Any], *processors: Any, **options: Any) -> list[list[int]]:
    with torch.no_grad():
        ids = model.generate(
            **inputs, **PLAIN, **options, max_new_tokens=8, logits_processor=LogitsProcessorList(processors)
        )
    return ids.tolist()  # type: ignore[no-any-return]


def bare() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    return tiny_llama(4), {"input_ids": IDS}, {"image_tokens": IMAGE}


def llava() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    return FAMILIES["llava"].build(), FAMILIES["llava"].inputs([(24, 32)]), {}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", [bare, llava])
def test_a_generation_from_before_the_context_runs_on_unpruned(kind: Any, use_cache: bool) -> None:
    model, inputs, marks = kind()
    alone, before, waiting = said(model, inputs, use_cache=use_cache), left_on(model), Stopping(3)
    worker = started(lambda: said(model, inputs, waiting, use_cache=use_cache))
    waiting.stop.wait()
    with tp.prune(model, EverySecond(), **marks):
        mine = said(model, inputs, use_cache=use_cache)
        waiting.stop.go.set()
        assert worker.result(PATIENCE) == alone
        assert said(model, inputs, use_cache=use_cache) == mine
    assert mine != alone
    assert left_on(model) == before


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", [bare, llava])
def test_a_generation_that_outlives_its_context_is_refused(kind: Any, use_cache: bool) -> None:
    model, inputs, marks = kind()
    alone, before, waiting = said(model, inputs), left_on(model), Stopping(3)
    with tp.prune(model, EverySecond(), **marks):
        worker = started(lambda: said(model, inputs, waiting, use_cache=use_cache))
        waiting.stop.wait()
    with tp.prune(model, EverySecond(), **marks):  # nor does another context take it over
        waiting.stop.go.set()
        with pytest.raises(UnsupportedError, match=r"in which this generate\(\) began is closed"):
            worker.result(PATIENCE)
    assert left_on(model) == before
    assert is_free(model)
    assert said(model, inputs) == alone


def test_a_forward_that_began_before_its_decoders_did_runs_on_unpruned(model: Any) -> None:
    """The context opens while the forward is in the embeddings, before the decoder is called."""
    with torch.no_grad():
        alone = model(IDS, use_cache=False).logits
        stop = Stop()
        inner = model.model.register_forward_pre_hook(lambda *_: stop())
        worker = started(lambda: torch.no_grad()(model)(IDS, use_cache=False).logits)
        stop.wait()
        inner.remove()
        with tp.prune(model, EverySecond(), image_tokens=IMAGE):
            stop.go.set()
            assert torch.equal(worker.result(PATIENCE), alone)
            assert not torch.equal(model(IDS, use_cache=False).logits, alone)


# the trace -----------------------------------------------------------------------------------------------------------


def test_the_trace_tells_of_prompts_whatever_other_threads_generate() -> None:
    """Guidance runs a second stream of text: after the prompt of its own call, and between those of another's."""
    model, family = FAMILIES["llava"].build(), FAMILIES["llava"]
    mine, other = family.inputs([(24, 32)]), family.inputs([(40, 20)], seed=1)
    waiting = Stopping(1)  # before the second stream
    with tp.prune(model, tp.strategy("fastv", layer=1, keep=4)) as run:
        said(model, other, guidance_scale=1.5)
        count = run.trace.ledger.image_tokens
        worker = started(lambda: said(model, mine, waiting, guidance_scale=1.5))
        waiting.stop.wait()
        said(model, other, guidance_scale=1.5)
        trace = run.trace
        assert trace.ledger.image_tokens == count > (0,)
        waiting.stop.go.set()
        worker.result(PATIENCE)
        assert run.trace is trace


def test_the_trace_tells_of_the_prompt_where_a_later_turn_has_a_second_stream() -> None:
    model, family = FAMILIES["llava"].build(), FAMILIES["llava"]
    options = {**PLAIN, "max_new_tokens": 3, "return_dict_in_generate": True}
    with torch.no_grad(), tp.prune(model, tp.strategy("fastv", layer=1, keep=4)) as run:
        output = model.generate(**family.inputs([(24, 32)]), **options)
        trace = run.trace
        ids = torch.cat((output.sequences, torch.tensor([[30, 31]])), 1)
        model.generate(ids, past_key_values=output.past_key_values, guidance_scale=1.5, **options)
        assert run.trace is trace


# calls that go past what intercepts them -----------------------------------------------------------------------------


def saved(model: Any) -> Any:
    """`model.generate` as it was before the context."""
    return model.generate


def of_the_class(model: Any) -> Any:
    """The class's function."""
    return lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)


@pytest.mark.parametrize("call", [saved, of_the_class])
@pytest.mark.parametrize("cached", [True, False])
def test_a_generate_that_goes_past_the_attribute_is_pruned(model: Any, call: Any, cached: bool) -> None:
    options = {
        "max_new_tokens": 4,
        "use_cache": cached,
        "output_logits": True,
        "return_dict_in_generate": True,
        **PLAIN,
    }
    generate = call(model)
    with torch.no_grad():
        with tp.prune(model, EverySecond(), image_tokens=IMAGE):
            expected = model.generate(IDS, **options)
        with tp.prune(model, EverySecond(), image_tokens=IMAGE) as run:
            found = generate(IDS, **options)
        assert run.trace.stages
        assert not torch.equal(torch.stack(found.logits), torch.stack(model.generate(IDS, **options).logits))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_forward_that_goes_past_the_attribute_is_pruned(model: Any) -> None:
    forward = model.forward
    with torch.no_grad(), tp.prune(model, EverySecond(), image_tokens=IMAGE) as run:
        expected = model(IDS).logits
        assert torch.equal(forward(IDS).logits, expected)
        assert torch.equal(type(model).forward(model, IDS).logits, expected)
    assert run.trace.stages


def test_a_model_whose_own_generate_opens_the_context_is_pruned(model: Any) -> None:
    class Pruning(type(model)):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            with tp.prune(self, EverySecond(), image_tokens=IMAGE) as self.run:
                return super().generate(*args, **kwargs)

    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, **PLAIN}
    with torch.no_grad():
        with tp.prune(model, EverySecond(), image_tokens=IMAGE):
            expected = model.generate(IDS, **options)
        model.__class__ = Pruning
        found = model.generate(IDS, **options)
    assert model.run.trace.stages
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_no_garbage_is_collected_while_frames_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection in `sys._current_frames` deadlocks in some releases of Python."""
    collects: list[bool] = []
    original = sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: (collects.append(gc.isenabled()), original())[1])
    EarlierCalls(object(), "forward").record()
    assert collects == [False]
    assert gc.isenabled()
