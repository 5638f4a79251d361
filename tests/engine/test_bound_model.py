"""Which adapter answers for a live model, and which ones are imported to find out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_plugins import AdapterPlugin, LoadsNothing
from torch import Tensor, nn

from tokenprune.core.decisions import Keep
from tokenprune.core.reads import Read
from tokenprune.engine import PromptMasks, prune
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.engine.interface.marked_model import MarkedModel
from tokenprune.errors import InputError, PluginError, UnsupportedError
from tokenprune.plugins import registry
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_registry")
IMAGE = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]).bool()


class Known(nn.Module):
    """A model that `Knows` knows."""


class Knows(LoadsNothing):
    """Binds one kind of model."""

    model_types = ("known", "known_too")

    @classmethod
    def bind(cls, model: Any) -> Any:
        return MarkedModel(model, image_tokens=None) if isinstance(model, Known) else None  # type: ignore[arg-type]


def test_adapters_after_the_one_that_knows_the_model_are_not_imported() -> None:
    registry.register_plugin(AdapterPlugin(knows=Knows, later="surely_not_installed:Adapter"), "ours")
    model = Known()
    assert bound_model_of(model).decoder is model


def test_one_that_is_asked_and_cannot_be_imported_is_named() -> None:
    registry.register_plugin(AdapterPlugin(knows=Knows, later="surely_not_installed:Adapter"), "ours")
    with pytest.raises(PluginError, match=r"'ours'.*'later'.*No module named 'surely_not_installed'"):
        bound_model_of(tiny_llama())


def test_a_model_that_nobody_knows() -> None:
    registry.register_plugin(AdapterPlugin(knows=Knows), "ours")
    with pytest.raises(InputError, match="where are the image tokens"):
        bound_model_of(tiny_llama())
    model = nn.Module()
    model.config = SimpleNamespace(vision_config=object(), model_type="car")  # type: ignore[assignment]
    with pytest.raises(
        UnsupportedError, match=r"Module \(model_type 'car'\); adapters know .*; knows: known, known_too;"
    ):
        bound_model_of(model)


def test_a_capture_needs_no_more_than_masks_and_answers() -> None:
    class Least(VisionCapture):
        def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
            return PromptMasks(IMAGE, queries)

        def provide(self, read: Read) -> Any:
            raise AssertionError("nothing is offered")

    class Bound(BoundModel):
        name, decoder, tower_layers = "least", tiny_llama(), 0

        def offers(self) -> frozenset[type[Read]]:
            return frozenset()

        @contextmanager
        def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
            yield Least()

    class Binds(Knows):
        @classmethod
        def bind(cls, model: Any) -> Any:
            return Bound()

    registry.register_plugin(AdapterPlugin(binds=Binds), name="binds")
    model, ids = Bound.decoder, torch.arange(1, 9)[None]
    script = Scripted([Step(1, Keep(torch.tensor([[0, 2]])))])
    with torch.no_grad(), prune(model, script) as run:
        found = model(ids, use_cache=True)
        later = model(ids[:, :2], past_key_values=found.past_key_values)  # asks what a later turn holds
    with torch.no_grad(), prune(model, script, image_tokens=IMAGE):
        marked = model(ids, use_cache=True)
        assert torch.equal(found.logits, marked.logits)
        assert torch.equal(later.logits, model(ids[:, :2], past_key_values=marked.past_key_values).logits)
    assert run.trace.ledger.later_turns == []
