"""What a run tells: lifecycle hooks, and an account that equals the tensors that really are there."""

from __future__ import annotations

import pytest
import torch

import tokenprune as tp
from tokenprune.cost import DecoderSpec, kv_bytes
from tokenprune.errors import PluginError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama


@pytest.fixture
def plugin():
    """Registers an observer for the length of a test."""
    names = []

    def add(observer, name="watching"):
        registry.register_plugin(observer, name=name)
        names.append(name)

    yield add
    for name in names:
        registry.unregister_plugin(name)


class Observer:
    """Notes every lifecycle hook."""

    def __init__(self):
        self.seen = []

    @tp.hookimpl
    def tokenprune_run_started(self, run):
        self.seen.append("started")

    @tp.hookimpl
    def tokenprune_stage_entered(self, run, stage):
        self.seen.append(("enter", stage.name, len(run.trace.stages)))

    @tp.hookimpl
    def tokenprune_decision_taken(self, run, stage, decision):
        self.seen.append((stage.name, stage.layer, stage.kind, type(decision).__name__, int(stage.active.sum())))

    @tp.hookimpl
    def tokenprune_prefill_done(self, run):
        self.seen.append(("prefill", len(run.trace.ledger.entries)))

    @tp.hookimpl
    def tokenprune_run_finished(self, run):
        self.seen.append("finished")


def inputs():
    image = torch.zeros(1, 24, dtype=torch.bool)
    image[:, 4:20] = True
    return torch.arange(1, 25)[None], image


def test_observers_see_every_step_without_subclassing(plugin):
    observer = Observer()
    plugin(observer)
    ids, image = inputs()
    with torch.no_grad(), tp.prune(tiny_llama(8), tp.strategy("csp", clustering="grid"), image_tokens=image):
        pass
    assert observer.seen == ["started", "finished"]
    observer.seen.clear()
    model = tiny_llama(8)
    with torch.no_grad(), tp.prune(model, tp.strategy("csp", clustering="grid"), image_tokens=image):
        model(ids)
    assert observer.seen == [
        "started",
        ("enter", "cluster", 0),
        ("cluster", 0, "park", "Keep", 4),
        ("enter", "scatter", 1),
        ("scatter", 2, "restore", "Restore", 16),
        ("enter", "prune", 2),
        ("prune", 4, "keep", "Keep", 1),
        ("prefill", 8),
        "finished",
    ]


def test_an_observer_that_fails_is_named_and_the_model_restored(plugin):
    class Failing:
        @tp.hookimpl
        def tokenprune_decision_taken(self, run, stage, decision):
            raise RuntimeError("disk full")

    plugin(Failing(), "failing")
    ids, image = inputs()
    model = tiny_llama(8)
    with torch.no_grad():
        before = model(ids).logits
        with (
            pytest.raises(PluginError, match=r"'failing'.*disk full"),
            tp.prune(model, tp.strategy("uniform"), image_tokens=image),
        ):
            model(ids)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("hook", ["tokenprune_run_started", "tokenprune_run_finished"])
def test_every_run_that_was_started_is_finished(plugin, hook):
    def fail(self, run):
        raise RuntimeError("disk full")

    observer, model = Observer(), tiny_llama(8)
    plugin(observer)
    plugin(type("Failing", (), {hook: tp.hookimpl(fail)})(), "failing")
    _, image = inputs()
    for times in (1, 2):  # no context stays open on the model
        with (
            pytest.raises(PluginError, match=rf"'failing'.*{hook}.*disk full"),
            tp.prune(model, tp.strategy("uniform"), image_tokens=image),
        ):
            pass
        assert observer.seen == ["started", "finished"] * times


@pytest.mark.parametrize("name", ["none", "blind", "random", "uniform", "fastv", "csp"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_counted_kv_bytes_are_those_of_the_real_cache(name, kv_heads):
    model = tiny_llama(8, kv_heads=kv_heads)
    ids, image = inputs()
    with torch.no_grad(), tp.prune(model, tp.strategy(name), image_tokens=image) as run:
        cache = model(ids, use_cache=True).past_key_values
    real = [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]
    counted = kv_bytes(run.trace.ledger, DecoderSpec.from_config(model.config), element_bytes=4)
    assert [layer[0] for layer in counted.by_layer] == real
