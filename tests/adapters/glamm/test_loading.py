"""Loading GLaMM checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from glamm_checkpoints import ADDED, GLAMM, HIDDEN, write_glamm
from lisa_checkpoints import CHANNELS, WIDTH, State, write_lisa
from transformers import CLIPVisionConfig, CLIPVisionModel

import tokenprune as tp
from tokenprune.errors import CheckpointError, OptionError
from tokenprune_adapters.glamm import GlammAdapter, GlammModel
from tokenprune_adapters.lisa import LisaAdapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glamm(tmp_path_factory.mktemp("glamm") / "tiny-glamm")


@pytest.fixture(scope="module")
def model(folder: Path) -> GlammModel:
    loaded: GlammModel = tp.load(folder)
    return loaded


def test_what_is_loaded(model: GlammModel) -> None:
    assert isinstance(model, GlammModel)
    assert model.name == "tiny-glamm"
    assert [tuple(p.shape) for p in model.projector.parameters()] == [
        (HIDDEN, 16),
        (HIDDEN,),
        (WIDTH, HIDDEN),
        (WIDTH,),
    ]
    assert model.sam.config.mask_decoder_config.hidden_size == CHANNELS
    assert model.seg_ids == [ADDED["[SEG]"]]
    assert [name for name, tensor in model.named_parameters() if tensor.is_meta] == []
    assert not model.training


def test_the_region_encoder_is_left_out_and_said_so(model: GlammModel, tmp_path: Path) -> None:
    assert model.left_out == ("model.region_encoder",)
    assert not [name for name, _ in model.named_parameters() if "region" in name]

    def without(state: State) -> None:
        del state["model.region_encoder.mlvl_fuse.input_conv.0.weight"]

    assert tp.load(write_glamm(tmp_path, edit=without)).left_out == ()


def test_matches_by_architecture() -> None:
    assert GlammAdapter.matches("x", GLAMM)
    assert not LisaAdapter.matches("x", GLAMM)
    assert not GlammAdapter.matches("x", {"architectures": ["LISAForCausalLM"]})
    assert not GlammAdapter.matches("x", {})


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    write_lisa(tmp_path, config={"architectures": ["GLaMMForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"is no GLaMM checkpoint: no tensors are under model\.grounding_encoder"):
        tp.load(tmp_path)


def test_no_vision_tower(tmp_path: Path) -> None:
    write_glamm(tmp_path, tower=False, config={"mm_vision_tower": "/no/such/tower"})
    with pytest.raises(CheckpointError, match=r"vision tower '/no/such/tower'.*pass vision_tower="):
        tp.load(tmp_path)


def test_a_tower_of_another_width(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    write_glamm(tmp_path / "model", tower=False)
    with pytest.raises(CheckpointError, match=r"features of width 24, but the projector of .* takes 16"):
        tp.load(tmp_path / "model", vision_tower=tmp_path / "tower")


@pytest.mark.parametrize("token", ["[SEG]", "<p>", "</p>", "<im_start>"])
def test_a_tokenizer_without_a_token(tmp_path: Path, token: str) -> None:
    added = {name: number for name, number in ADDED.items() if name != token}
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* lacks") as found:
        tp.load(write_glamm(tmp_path, added=added))
    assert f"lacks {token} " in str(found.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.mm_projector.2.bias", None, "1 tensor is missing: model.mm_projector.2.bias"),
        ("model.grounding_encoder.mask_decoder.iou_token.weight", None, "1 tensor is missing"),
        ("model.surprise.weight", torch.zeros(2), "1 tensor is unexpected: model.surprise.weight"),
        ("model.mm_projector.2.weight", torch.zeros(3, HIDDEN), "mis-shaped: model.mm_projector.2.weight"),
        ("model.mm_projector.0.weight", None, "'model.mm_projector.0.weight' is missing"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    def edit(state: State) -> None:
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor

    with pytest.raises(CheckpointError, match=message):
        tp.load(write_glamm(tmp_path, edit=edit))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_sed": 3}, "GLaMM models have no load option 'template_sed'; did you mean 'template_seed'"),
        ({"template_seed": "one"}, "template_seed: 'one' found, expected a whole number"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tp.load(folder, **options)
