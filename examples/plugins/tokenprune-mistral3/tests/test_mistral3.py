"""The adapter `mistral3`: the conformance kit for adapters, and what is this family's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mistral3 import inputs, tiny_model
from tokenprune_mistral3.adapter import MODEL_TYPE, Mistral3Adapter

import tokenprune as tp
from tokenprune import Keep, Stage, Strategy, TowerFeatures
from tokenprune.testing.adapter_conformance import AdapterConformance

IMAGES = [[(2, 3)], [(2, 2), (3, 1)]]  # of two prompts: rows and columns of tokens


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    with torch.inference_mode():
        model(**inputs([(2, 2)]))  # at its first call, transformers puts hooks of its own on a model
    return model


class TestConformance(AdapterConformance):
    adapter = "mistral3"

    def model(self) -> Any:
        return tiny_model()

    def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
        return inputs(*(IMAGES[row] for row in rows), first=rows[0])

    def text(self) -> dict[str, Any]:
        return inputs([])


class Look(Strategy):
    """Keeps three tokens of the largest features, and what it was shown (copies)."""

    name = "look"

    def stages(self, shape):
        yield Stage("look", 0, min(3, shape.image_tokens), TowerFeatures())

    def choose(self, stage, tokens):
        type(self).seen = {name: getattr(tokens, name).clone() for name in ("features", "grid", "image", "active")}
        return Keep.top(tokens.features.norm(dim=-1).masked_fill(~tokens.active, -torch.inf), tokens.target)


def test_it_is_installed() -> None:
    assert tp.adapters()["mistral3"].distribution == "tokenprune-mistral3"


def test_it_knows_its_own_models_only(model: Any) -> None:
    assert Mistral3Adapter.matches("folder", {"model_type": MODEL_TYPE})
    assert not Mistral3Adapter.matches("folder", {"model_type": "another"})
    assert Mistral3Adapter.bind(model.model) is not None


def test_calls_of_two_threads_are_not_mixed(model: Any) -> None:
    """The other's whole call comes between what this one's hooks see and where its decoder begins."""

    @torch.inference_mode()
    def states(images: list[tuple[int, int]]) -> torch.Tensor:
        return model(**inputs(images)).logits

    def meet(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(other.submit(states, [(4, 2)]).result(60))

    seen: list[torch.Tensor] = []
    strategy = tp.strategy("uniform", keep=4)
    with tp.prune(model, strategy):
        alone = [states([(2, 3)]), states([(4, 2)])]
    handle = model.model.language_model.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(1) as other, tp.prune(model, strategy):
        mine = states([(2, 3)])
    handle.remove()
    assert torch.equal(mine, alone[0])
    assert torch.equal(seen[0], alone[1])


@torch.inference_mode()
def test_image_tokens_are_pruned(model: Any) -> None:
    with tp.prune(model, tp.strategy("uniform", keep=4)) as run:
        model(**inputs([(2, 3), (4, 2)]))
    assert run.trace.ledger.image_tokens == (14,)
    assert run.trace.ledger.equivalent_tokens == 4


@torch.inference_mode()
def test_strategies_see_images_not_lines(model: Any) -> None:
    """[IMG_BREAK] stands between the lines of an image, which is one image all the same."""
    with tp.prune(model, Look()):
        model(**inputs([(2, 3)], [(1, 2), (2, 1)]))
    assert Look.seen["image"].tolist() == [[0] * 6, [0, 0, 1, 1, -1, -1]]
    assert Look.seen["grid"][0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert Look.seen["grid"][1, :4].tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]]


@torch.inference_mode()
def test_features_are_those_of_the_tokens_patches(model: Any) -> None:
    given = inputs([(2, 3)])
    states = model.model.vision_tower(given["pixel_values"], image_sizes=given["image_sizes"]).last_hidden_state[0]
    patches = states.view(4, 6, -1)
    with tp.prune(model, Look()):
        model(**given)
    features = Look.seen["features"][0]
    for token, (row, column) in enumerate(Look.seen["grid"][0].tolist()):
        expected = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1).mean(0)
        torch.testing.assert_close(features[token], expected)


@torch.inference_mode()
def test_compiled_code_does_not_pass_by_the_capture() -> None:
    """Of a model whose projector was compiled, and called, before it was pruned."""
    model = tiny_model()
    with tp.prune(model, Look()):
        expected = model(**inputs([(2, 3)])).logits
    features = Look.seen["features"]
    model.model.multi_modal_projector.compile(backend="eager")
    model(**inputs([(1, 2)]))
    with tp.prune(model, Look()):
        torch.testing.assert_close(model(**inputs([(2, 3)])).logits, expected)
    torch.testing.assert_close(Look.seen["features"], features)


@torch.inference_mode()
def test_wrong_calls_are_told(model: Any) -> None:
    given = inputs([(2, 3)])
    embeddings = model.get_input_embeddings()(given["input_ids"])
    uniform = tp.strategy("uniform", keep=4)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="without input_ids"):
        model(inputs_embeds=embeddings)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="6 image tokens, but its images give 0"):
        model(input_ids=given["input_ids"])


@torch.inference_mode()
def test_checkpoints_are_loaded(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    given = inputs([(2, 3)])
    loaded = tp.load(tmp_path)
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits)
    with pytest.raises(tp.TokenPruneError, match="no load option 'colour'"):
        tp.load(tmp_path, colour="red")
