"""The adapter `voxtral`: the conformance kit for adapters, and what is this family's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_voxtral import LENGTH, inputs, tiny_model
from tokenprune_voxtral.adapter import MODEL_TYPE, VoxtralAdapter

import tokenprune as tp
from tokenprune import Keep, Stage, Strategy, TowerFeatures
from tokenprune.testing.adapter_conformance import AdapterConformance

CLIPS = [1, 2]  # of two prompts


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    with torch.inference_mode():
        model(**inputs(1))  # at its first call, transformers puts hooks of its own on a model
    return model


class TestConformance(AdapterConformance):
    adapter = "voxtral"

    def model(self) -> Any:
        return tiny_model()

    def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
        return inputs(*(CLIPS[row] for row in rows), first=rows[0])

    def text(self) -> dict[str, Any]:
        return inputs(0)


class Look(Strategy):
    """Keeps three tokens of the largest features, and what it was shown (copies)."""

    name = "look"

    def stages(self, shape):
        yield Stage("look", 0, min(3, shape.image_tokens), TowerFeatures())

    def choose(self, stage, tokens):
        type(self).seen = {name: getattr(tokens, name).clone() for name in ("features", "grid", "image", "active")}
        return Keep.top(tokens.features.norm(dim=-1).masked_fill(~tokens.active, -torch.inf), tokens.target)


def test_it_is_installed() -> None:
    assert tp.adapters()["voxtral"].distribution == "tokenprune-voxtral"


def test_it_knows_its_own_models_only(model: Any) -> None:
    assert VoxtralAdapter.matches("folder", {"model_type": MODEL_TYPE})
    assert not VoxtralAdapter.matches("folder", {"model_type": "another"})
    assert VoxtralAdapter.bind(model.model) is not None


def test_calls_of_two_threads_are_not_mixed(model: Any) -> None:
    """The other's whole call comes between what this one's hooks see and where its decoder begins."""

    @torch.inference_mode()
    def states(clips: int) -> torch.Tensor:
        return model(**inputs(clips)).logits

    def meet(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(other.submit(states, 3).result(60))

    seen: list[torch.Tensor] = []
    strategy = tp.strategy("uniform", keep=4)
    with tp.prune(model, strategy):
        alone = [states(2), states(3)]
    handle = model.model.language_model.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(1) as other, tp.prune(model, strategy):
        mine = states(2)
    handle.remove()
    assert torch.equal(mine, alone[0])
    assert torch.equal(seen[0], alone[1])


@torch.inference_mode()
def test_audio_tokens_are_pruned(model: Any) -> None:
    with tp.prune(model, tp.strategy("uniform", keep=4)) as run:
        model(**inputs(3))
    assert run.trace.ledger.image_tokens == (3 * LENGTH,)
    assert run.trace.ledger.equivalent_tokens == 4


@torch.inference_mode()
def test_strategies_see_clips_as_lines(model: Any) -> None:
    with tp.prune(model, Look()):
        model(**inputs(1, 2))
    assert Look.seen["image"].tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 0, 1, 1, 1]]
    assert Look.seen["grid"][1].tolist() == [[0, 0], [0, 1], [0, 2]] * 2


@torch.inference_mode()
def test_features_are_the_frames_of_each_token(model: Any) -> None:
    given = inputs(1, 2)
    frames = model.model.audio_tower(given["input_features"]).last_hidden_state
    tokens = frames.view(3, LENGTH, 4, -1).flatten(2)
    with tp.prune(model, Look()):
        model(**given)
    torch.testing.assert_close(Look.seen["features"][0, :LENGTH], tokens[0])
    torch.testing.assert_close(Look.seen["features"][1], tokens[1:].flatten(0, 1))


@torch.inference_mode()
def test_compiled_code_does_not_pass_by_the_capture() -> None:
    """Of a model whose projector was compiled, and called, before it was pruned."""
    model = tiny_model()
    with tp.prune(model, Look()):
        expected = model(**inputs(2)).logits
    features = Look.seen["features"]
    model.model.multi_modal_projector.compile(backend="eager")
    model(**inputs(1))
    with tp.prune(model, Look()):
        torch.testing.assert_close(model(**inputs(2)).logits, expected)
    torch.testing.assert_close(Look.seen["features"], features)


@torch.inference_mode()
def test_wrong_calls_are_told(model: Any) -> None:
    given = inputs(2)
    embeddings = model.get_input_embeddings()(given["input_ids"])
    uniform = tp.strategy("uniform", keep=4)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="without input_ids"):
        model(inputs_embeds=embeddings)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="6 audio tokens, but its clips give 0"):
        model(input_ids=given["input_ids"])


@torch.inference_mode()
def test_checkpoints_are_loaded(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    given = inputs(1)
    loaded = tp.load(tmp_path)
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits)
    with pytest.raises(tp.TokenPruneError, match="no load option 'colour'"):
        tp.load(tmp_path, colour="red")
