"""The adapter `internvl-chat`: the conformance kit for adapters, and what is this family's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_internvl_chat import prompts, write_checkpoint
from tokenprune_internvl_chat.adapter import InternVLChatAdapter

import tokenprune as tp
from tokenprune import Keep, Stage, Strategy, TowerFeatures
from tokenprune.testing.adapter_conformance import AdapterConformance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("internvl") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return tp.load(folder, trust_remote_code=True)


class TestConformance(AdapterConformance):
    adapter = "internvl-chat"

    @pytest.fixture(autouse=True)
    def _ready(self, model: Any) -> None:
        self._loaded = model
        self.prepare()

    def model(self) -> Any:
        return copy.deepcopy(self._loaded)

    def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
        return prompts(rows)

    def text(self) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}


class Look(Strategy):
    """Keeps three tokens, and what it was shown (copies)."""

    name = "look"

    def stages(self, shape):
        yield Stage("look", 0, 3, TowerFeatures())

    def choose(self, stage, tokens):
        type(self).seen = {name: getattr(tokens, name).clone() for name in ("features", "grid", "image")}
        return Keep.top(tokens.features.norm(dim=-1).masked_fill(~tokens.active, -torch.inf), 3)


def test_code_is_run_only_if_it_is_trusted(folder: Path) -> None:
    assert tp.adapters()["internvl-chat"].distribution == "tokenprune-internvl-chat"
    with pytest.raises(tp.TokenPruneError, match="code that would run on this machine; read it, and pass trust_remote"):
        tp.load(folder)
    with pytest.raises(tp.TokenPruneError, match="no load option 'colour'"):
        tp.load(folder, trust_remote_code=True, colour="red")
    assert not InternVLChatAdapter.matches("folder", {"model_type": "internvl"})  # that of transformers


@torch.inference_mode()
def test_tiles_cells_and_features(model: Any) -> None:
    with tp.prune(model, Look()):
        model(**prompts([0, 1]))
    assert Look.seen["image"].tolist() == [[0] * 4 + [1] * 4, [0] * 4 + [-1] * 4]
    assert Look.seen["grid"][0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] * 2
    made = model.mlp1(Look.seen["features"])
    expected = model.extract_feature(prompts([0, 1])["pixel_values"])
    assert torch.allclose(made[0], expected[:2].flatten(0, 1), atol=1e-6)
    assert torch.allclose(made[1, :4], expected[2], atol=1e-6)


@torch.inference_mode()
def test_generate_prunes_what_a_forward_prunes(model: Any) -> None:
    inputs = prompts([0, 1])
    with tp.prune(model, Look()) as run:
        model(**inputs)
        kept = run.trace.stages[0].kept
        answers = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answers.shape == (2, 3)
        assert run.trace.stages[0].kept == kept
    with tp.prune(model, tp.strategy("uniform", keep=3)) as run:
        several = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2, num_return_sequences=2)
    assert several.shape == (4, 3)
    assert run.trace.ledger.entries[-1].image == (3, 3, 3, 3)


def test_a_model_that_does_not_know_its_image_token(model: Any) -> None:
    fresh = copy.deepcopy(model)
    fresh.img_context_token_id = None
    with (
        tp.prune(fresh, tp.strategy("uniform", keep=2)),
        pytest.raises(tp.TokenPruneError, match="set it to tokenizer"),
    ):
        fresh(input_ids=prompts([0])["input_ids"])
