"""Loading PixelLM checkpoints of unusual sizes, and refusing what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lisa_checkpoints import State, write_lisa
from pixellm_checkpoints import ADDED, CHANNELS, SQUARE, state_dict, tower_model, write_pixellm

import tokenprune as tp
from tokenprune.errors import CheckpointError
from tokenprune_adapters.pixellm import PixelLMAdapter, PixelLMModel
from tokenprune_adapters.pixellm.pixel_decoder import stored_name
from tokenprune_adapters.pixellm.tower import resized_positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixellm(tmp_path_factory.mktemp("pixellm") / "tiny-pixellm")


@pytest.fixture(scope="module")
def model(folder: Path) -> PixelLMModel:
    loaded: PixelLMModel = tp.load(folder)
    return loaded


def test_sizes_come_from_the_weights(model: PixelLMModel) -> None:
    decoder = model.pixel_decoder.mask_decoder
    config = decoder.transformer[0].config
    assert (config.hidden_size, config.mlp_dim, config.num_hidden_layers) == (CHANNELS, 20, 1)
    assert (config.num_attention_heads, config.attention_downsample_rate) == (2, 2)
    assert (len(decoder.output_hypernetworks_mlps), len(decoder.iou_prediction_head.layers)) == (3, 2)
    assert len(model.pixel_decoder.prompt_encoder.point_embed) == 3
    assert (model.square, model.pixel_decoder.side, model.name) == (SQUARE, 32, "tiny-pixellm")
    assert not model.training


def test_layer_norm_epsilons(model: PixelLMModel) -> None:
    decoder = model.pixel_decoder.mask_decoder
    block = decoder.transformer[1].layers[0]
    assert {norm.eps for norm in (block.layer_norm1, block.layer_norm2, block.layer_norm3, block.layer_norm4)} == {1e-5}
    neck = model.pixel_decoder.image_feature_neck
    assert {norm.eps for norm in (neck[1], neck[3], decoder.output_upscaling[1], decoder.upsample_2x[1])} == {1e-6}


def test_every_tensor_arrives_under_its_name(model: PixelLMModel) -> None:
    parts = {
        "": model.decoder,
        "model.mm_projector.": model.projector,
        "model.out_mm_projector.": model.mask_projector,
        "model.text_hidden_fcs.0.": model.mask_projection,
    }
    found = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}
    found.update({stored_name(name, 4): t for name, t in model.pixel_decoder.state_dict().items()})
    wanted = {name: tensor for name, tensor in state_dict().items() if not name.endswith("inv_freq")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.is_meta] == []


def test_the_last_position_is_taken_for_cls() -> None:
    table = torch.arange(10.0)[:, None].repeat(1, 2)  # a grid of 3×3, row by row, then one more
    assert torch.equal(resized_positions(table, 3), table)
    larger = resized_positions(table, 6)
    assert larger.shape == (37, 2)
    assert torch.equal(larger[-1], table[-1])
    assert larger[0].tolist() == [0.0, 0.0]  # bilinear: corners stay
    assert larger[35].tolist() == [8.0, 8.0]
    assert larger[1].tolist() == [0.25, 0.25]


def test_positions_are_resized_before_they_are_rounded(folder: Path, model: PixelLMModel) -> None:
    loaded = tp.load(folder, dtype="bfloat16")
    name = next(name for name in model.state_dict() if name.endswith("position_embedding.weight"))
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name].bfloat16())


def test_no_vision_tower(tmp_path: Path) -> None:
    bare = write_pixellm(tmp_path, with_tower=False)
    with pytest.raises(CheckpointError, match="vision tower 'nobody/no-such-tower': no such folder"):
        tp.load(bare)


def test_matches_by_architecture(golden: Callable[[str], Path]) -> None:
    config = json.loads((golden("pixellm") / "checkpoint" / "config.json").read_text())
    assert PixelLMAdapter.matches("x", config)
    assert not PixelLMAdapter.matches("x", {"architectures": ["LISAForCausalLM"]})
    assert not PixelLMAdapter.matches("x", {})


def _drop(name: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        del state[name]

    return edit


def _add(name: str, *shape: int) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[name] = torch.zeros(*shape)

    return edit


def _three_levels(state: State) -> None:
    state["model.mask_decoder.level_embed.weight"] = torch.zeros(3, CHANNELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": _drop("model.mask_decoder.pe1.positional_encoding_gaussian_matrix")}, r"pe1\.positional_.* missing"),
        ({"edit": _drop("model.mask_decoder.upsample_2x.0.bias")}, r"1 tensor is missing: model\.mask_decoder\.upsamp"),
        ({"edit": _add("model.mask_decoder.extra", 2)}, r"unexpected: model\.mask_decoder\.extra"),
        ({"edit": _add("model.image_feature_neck.0.weight", CHANNELS, 5, 1, 1)}, r"mis-shaped: model\.image_feature_n"),
        ({"edit": _three_levels}, "3 levels and 2 transformers, expected 2 of each"),
        ({"config": {"sam_mask_decoder_heads": 7}}, "7 attention heads do not fit the pixel decoder"),
        ({"config": {"resize_vision_tower_size": 63}}, "patches of 2 pixels, which do not divide the 63 pixels"),
        ({"added": {"[SEG]": 640, "<im_start>": 646, "<im_end>": 647}}, r"lacks \[SEG0\], \[SEG1\]"),
        ({"added": {name: i for name, i in ADDED.items() if name != "[SEG5]"}}, r"lacks \[SEG5\]"),
        ({"tower": tower_model(layers=9)}, "9 layers, but PixelLM reads the hidden states number -11"),
    ],
    ids=["pe1", "missing", "unexpected", "shape", "levels", "heads", "square", "no codebook", "five tokens", "shallow"],
)
def test_what_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tp.load(write_pixellm(tmp_path, **options))


def test_a_tower_of_another_width(tmp_path: Path) -> None:
    def wider(state: State) -> None:
        state["model.mm_projector.0.weight"] = torch.zeros(64, 24)

    with pytest.raises(CheckpointError, match=r"features of width 16, but the projector .* takes 24"):
        tp.load(write_pixellm(tmp_path, edit=wider))


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    lisa = write_lisa(tmp_path, config={"architectures": ["PixelLMForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"no PixelLM checkpoint: no tensors are under model\.image_feature_neck"):
        tp.load(lisa)
