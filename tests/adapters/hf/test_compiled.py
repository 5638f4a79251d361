"""Vision-language models that go through torch.compile, whole or in parts: pruned as the plain model is."""

from __future__ import annotations

import pytest
import torch
from vlm_cases import TOLERANCE, inputs_of
from vlm_families import FAMILIES

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom, ClsFeatures, Crops, TowerFeatures, TowerKeys, TowerStates
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy

NAME = "llava"
SIZES = [(40, 24), (24, 32)]
GREEDY = {"max_new_tokens": 3, "do_sample": False}
READS = {
    "features": (1, TowerFeatures()),
    "keys": (1, TowerKeys(layer=-1)),
    "states": (1, TowerStates(0, -1)),
    "[CLS] features": (1, ClsFeatures()),
    "crops": (1, Crops()),
    "attention": (2, AttentionFrom("last")),
}


class Largest(Strategy):
    """The half with the largest numbers of what it reads."""

    name = "largest"

    def __init__(self, layer, read):
        super().__init__()
        self._stage = Stage("half", layer, reads=read)

    def stages(self, shape):
        return [self._stage]

    def choose(self, stage, tokens):
        values = tokens.read(stage.reads[0]).float()
        if values.dim() > 2:
            values = values.norm(dim=-1)
        order = torch.arange(values.shape[1]) / 1e4  # where all are equal
        return Keep.top((values + order).masked_fill(~tokens.active, -torch.inf), tokens.count(0.5))


def model_wrapped(model):
    return torch.compile(model, backend="eager")


def model_in_place(model):
    model.compile(backend="eager")
    return model


def base_in_place(model):
    model.model.compile(backend="eager")
    return model


def base_wrapped(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def decoder_wrapped(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def tower_in_place(model):
    model.model.vision_tower.compile(backend="eager")
    model.model.multi_modal_projector.compile(backend="eager")
    return model


def tower_wrapped(model):
    model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager")
    model.model.multi_modal_projector = torch.compile(model.model.multi_modal_projector, backend="eager")
    return model


ROUTES = [
    model_wrapped,
    model_in_place,
    base_in_place,
    base_wrapped,
    decoder_wrapped,
    tower_in_place,
    tower_wrapped,
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def pruned(model, strategy):
    """Logits of two prompts and of their images, each in a context of its own, and a generated text."""
    found = []
    for inputs in (inputs_of(NAME), inputs_of(NAME, sizes=tuple(SIZES), seed=3)):
        with tokenprune.prune(model, strategy):
            found.append(model(**inputs).logits)
    with tokenprune.prune(model, strategy):
        return found, model.generate(**inputs_of(NAME), **GREEDY)


def check(route, warm, reads):
    model = FAMILIES[NAME].build()
    plain = model(**inputs_of(NAME)).logits
    expected = {name: pruned(model, Largest(*READS[name])) for name in reads}
    called = route(model)
    if warm:
        assert torch.allclose(called(**inputs_of(NAME)).logits, plain, atol=TOLERANCE)
    for name, (logits, text) in expected.items():
        found, words = pruned(called, Largest(*READS[name]))
        for ours, theirs in zip(found, logits, strict=True):
            assert not torch.allclose(theirs[: len(plain), -1], plain[:, -1], atol=1e-3)
            assert (ours - theirs).abs().max() < TOLERANCE, name
        assert torch.equal(words, text), name
    if warm:
        assert torch.allclose(called(**inputs_of(NAME)).logits, plain, atol=TOLERANCE)


def test_a_warm_tower_and_projector_are_read():
    check(tower_in_place, True, ["features", "states", "[CLS] features", "crops"])


def test_a_model_that_is_compiled_in_its_first_context():
    check(model_in_place, False, ["features", "attention"])


def test_parts_that_are_wrapped_are_found():
    check(lambda model: tower_wrapped(decoder_wrapped(model)), False, ["features"])


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("warm", [False, True])
def test_every_way_and_read(route, warm):
    check(route, warm, READS)
