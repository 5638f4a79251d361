"""A model that is changed while a context is open on it, or by what was put on it meanwhile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from model_state import state
from torch import nn

from tokenprune.core.decisions import Keep
from tokenprune.engine import prune
from tokenprune.engine.calls.interception import Shadow
from tokenprune.errors import EngineError, UnsupportedError
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS = 4
IDS = torch.arange(1, 25).reshape(2, 12)
IMAGE = torch.zeros(2, 12, dtype=torch.bool)
IMAGE[:, 2:8] = True
HALF = Scripted([Step(1, Keep.where(torch.tensor([[True, False, True, False, True, False]] * 2)))])
NONE = Scripted([])


@pytest.fixture
def model() -> Any:
    return tiny_llama(LAYERS)


def pruned(model: Any, strategy: Any = HALF) -> Any:
    return prune(model, strategy, image_tokens=IMAGE)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


# a forward that is put back ------------------------------------------------------------------------------------------

PARTS = {
    "the model": lambda model: model,
    "the decoder": lambda model: model.model,
    **{f"layer {number}": lambda model, number=number: model.model.layers[number] for number in range(LAYERS)},
}


def by_accelerate(module: nn.Module) -> Callable[[], Any]:
    add_hook_to_module(module, ModelHook())
    return lambda: remove_hook_from_module(module)


def by_accelerates_next(module: nn.Module) -> Callable[[], Any]:
    add_hook_to_module(module, ModelHook())
    return lambda: add_hook_to_module(module, ModelHook())  # around what was there before the first one


def by_hand(module: nn.Module) -> Callable[[], Any]:
    saved = module.forward
    return lambda: setattr(module, "forward", saved)


def by_deletion(module: nn.Module) -> Callable[[], Any]:
    return lambda: delattr(module, "forward")


ROUTES = [by_accelerate, by_accelerates_next, by_hand, by_deletion]


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("part", PARTS)
def test_a_forward_that_is_put_back_is_told(model: Any, part: str, route: Any, called: bool) -> None:
    """At the next call where the engine sees that, else when the context closes."""
    expected = logits(model)
    module = PARTS[part](model)
    back = route(module)

    def run() -> None:
        with pruned(model):
            logits(model)
            back()
            if called and part != "the model":
                with pytest.raises(
                    EngineError, match=r"forward was replaced|whose forward was not intercepted|after 3 of 4"
                ):
                    logits(model)

    with pytest.raises(EngineError, match=r"forward was replaced while .* add or remove hooks and wrappers") as caught:
        run()
    assert type(module).__name__ in str(caught.value)
    assert not shadows(model)
    assert torch.equal(logits(model), expected)


def shadows(model: nn.Module) -> list[Any]:
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Shadow)]


@pytest.mark.parametrize("part", PARTS)
def test_what_is_put_around_a_forward_and_taken_off_again_changes_nothing(model: Any, part: str) -> None:
    with pruned(model):
        expected = logits(model)
    module = PARTS[part](model)
    with pruned(model):
        add_hook_to_module(module, ModelHook())
        assert torch.equal(logits(model), expected)
        remove_hook_from_module(module)
        assert torch.equal(logits(model), expected)
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]
        assert torch.allclose(logits(model), expected)


def test_a_layer_may_be_called_by_itself(model: Any) -> None:
    hidden = torch.randn(1, 5, 32)
    tables = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with torch.no_grad():
        expected = model.model.layers[1](hidden, position_embeddings=tables)
        with pruned(model):
            assert torch.equal(model.model.layers[1](hidden, position_embeddings=tables), expected)


# other layers --------------------------------------------------------------------------------------------------------


def another(number: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers[number] = tiny_llama(LAYERS).model.layers[number]

    return change


def fewer(number: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.model.layers = model.model.layers[:number]

    return change


def more(model: Any) -> None:
    model.model.layers.append(tiny_llama(LAYERS).model.layers[0])
    model.config.num_hidden_layers = LAYERS + 1


def not_all(model: Any) -> None:
    model.config.num_hidden_layers = 3


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    **{
        f"another {number}": (another(number), f"layer {number} was replaced by another module")
        for number in range(LAYERS)
    },
    **{f"{number} layers": (fewer(number), f"{number} layers found, expected 4") for number in range(LAYERS)},
    "one more": (more, "5 layers found, expected 4"),
    "not all called": (not_all, "ended after 3 of 4 layers"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_layers_are_refused_by_name(model: Any, change: str) -> None:
    act, message = CHANGES[change]
    with pruned(model):
        act(model)
        with pytest.raises(EngineError, match=f"LlamaModel was changed while .*{message}.*change the model before"):
            logits(model)
    assert not shadows(model)


@pytest.mark.parametrize("number", range(LAYERS))
def test_another_layer_is_refused_in_a_step(model: Any, number: int) -> None:
    with torch.no_grad(), pruned(model):
        cache = model(IDS).past_key_values
        another(number)(model)
        with pytest.raises(EngineError, match=f"layer {number} was replaced by another module"):
            model(IDS[:, :1], past_key_values=cache)


def test_fewer_layers_are_the_models_own_affair_where_nothing_is_pruned(model: Any) -> None:
    model.config.num_hidden_layers = 3
    expected = logits(model)
    model.config.num_hidden_layers = 4
    with pruned(model, NONE):
        model.config.num_hidden_layers = 3
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("number", range(LAYERS))
def test_a_context_is_not_closed_in_the_middle_of_a_forward(model: Any, number: int, pre: bool) -> None:
    before, expected = state(model), logits(model)
    stack = ExitStack()
    stack.enter_context(pruned(model))
    layer = model.model.layers[number]
    handle = (layer.register_forward_pre_hook if pre else layer.register_forward_hook)(lambda *_: stack.close())
    with pytest.raises(EngineError, match=r"closed during a forward.*close it after the model has returned"):
        logits(model)
    handle.remove()
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    with pruned(model):
        assert not torch.equal(logits(model), expected)


# copies --------------------------------------------------------------------------------------------------------------


def hooked(model: Any) -> None:
    add_hook_to_module(model.model, ModelHook())


def prepared(model: Any) -> None:
    Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def kept(model: Any) -> None:
    model.kept = model.forward, model.model.forward


@pytest.mark.parametrize("put", [hooked, prepared, kept])
def test_what_was_put_on_a_model_in_a_context_is_copied_after_it(model: Any, put: Any) -> None:
    with pruned(model):
        put(model)
        with pytest.raises(UnsupportedError, match="cannot be copied or pickled under"):
            copy.deepcopy(model)
    expected = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), expected)  # its calls are its own
    with pruned(other):
        assert not torch.equal(logits(other), expected)


def test_a_shallow_copy_of_a_context_is_copied_after_it(model: Any) -> None:
    expected = logits(model)
    with pruned(model):
        other = copy.copy(model)
    assert torch.equal(logits(copy.deepcopy(other)), expected)


def test_what_was_kept_in_a_context_is_pickled_as_the_original(model: Any) -> None:
    expected = logits(model)
    with pruned(model):
        kept(model)
        with pytest.raises(UnsupportedError, match="cannot be copied or pickled under"):
            pickle.dumps(model)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other), expected)
    assert other.kept == (other.forward, other.model.forward)
