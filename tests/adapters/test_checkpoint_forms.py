"""Forms of checkpoints: shards without an index, LLaVA-1.5's projector, towers of 336 pixels, quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import WIDTH, State, tower_model, write_lisa
from pixellm_checkpoints import write_pixellm
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import CheckpointError

WRITERS: dict[str, Callable[..., Path]] = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}
FILES = ["model.safetensors", "pytorch_model.bin"]
IMAGE = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
needs_tiny_processors = pytest.mark.skipif(
    not CURRENT, reason="the tiny processors are those of transformers 5.20 and later"
)


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("files", FILES)
def test_shards_need_no_index_where_all_are_there(tmp_path: Path, family: str, files: str) -> None:
    wanted = tp.load(WRITERS[family](tmp_path / "one")).state_dict()
    folder = WRITERS[family](tmp_path / "three", files=files, shards=3)
    (folder / f"{files}.index.json").unlink()
    found = tp.load(folder).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, files: str, number: int) -> None:
    write_lisa(tmp_path, files=files, shards=3)
    (tmp_path / f"{files}.index.json").unlink()
    gone = f"{files.split('.')[0]}-0000{number}-of-00003.{files.split('.')[1]}"
    (tmp_path / gone).unlink()
    with pytest.raises(CheckpointError, match=f"shards without an index, and {gone} is missing; fetch that file"):
        tp.load(tmp_path)


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    write_lisa(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(WIDTH)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="shards without an index, of 2 checkpoints"):
        tp.load(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    both = {"model.norm.weight": torch.ones(WIDTH), "lm_head.weight": torch.ones(643, WIDTH)}
    for number in (1, 2):
        save_file(both, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"both model-00001-of-00002.* and model-00002-of-00002.* contain"):
        tp.load(tmp_path)


@needs_tiny_processors
def test_shards_of_transformers_models_want_their_index(tmp_path: Path) -> None:
    folder = write_vlm(tmp_path, "llava")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shards without an index.*fetch model\.safetensors\.index\.json"):
        tp.load(folder)


# projectors ----------------------------------------------------------------------------------------------------------


def layers(*widths: int) -> State:
    drawn = torch.Generator().manual_seed(5)
    found: State = {}
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        found[f"model.mm_projector.{2 * number}.weight"] = torch.randn(outputs, inputs, generator=drawn) * 0.3
        found[f"model.mm_projector.{2 * number}.bias"] = torch.randn(outputs, generator=drawn)
    return found


def projected(tensors: State, features: Tensor, depth: int) -> Tensor:
    """LLaVA's `mlp{depth}x_gelu`, written out."""
    for number in range(depth):
        weight, bias = (tensors[f"model.mm_projector.{2 * number}.{name}"] for name in ("weight", "bias"))
        features = functional.gelu(features) if number else features
        features = features @ weight.T + bias
    return features


def with_projector(tensors: State) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for name in [name for name in state if name.startswith("model.mm_projector.")]:
            del state[name]
        state.update(tensors)

    return edit


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize(("widths", "depth"), [((16, WIDTH), 1), ((16, 20, WIDTH), 2), ((16, 20, 24, WIDTH), 3)])
@pytest.mark.parametrize("told", [True, False])
def test_projectors_of_llava_1_5(tmp_path: Path, family: str, widths: Any, depth: int, told: bool) -> None:
    tensors = layers(*widths)
    config = {"mm_projector_type": f"mlp{depth}x_gelu"} if told else {}
    model = tp.load(WRITERS[family](tmp_path, edit=with_projector(tensors), config=config))
    features = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.projector(features), projected(tensors, features, depth), atol=1e-5)
    assert model.segment(IMAGE, "the cat", tp.strategy("fastv", budget=0.6)).masks.shape == (1, 40, 50)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("linear", "says mm_projector_type 'linear', but the weights contain a projector of 2 linear layers"),
        ("mlp3x_gelu", "says mm_projector_type 'mlp3x_gelu', but the weights contain a projector of 2 linear layers"),
        ("identity", "says mm_projector_type 'identity', expected 'linear' or 'mlp2x_gelu'"),
        ("mlp2x_silu", "says mm_projector_type 'mlp2x_silu', expected 'linear'"),
        ("resampler", "says mm_projector_type 'resampler', expected 'linear'"),
    ],
)
def test_a_projector_that_the_config_does_not_agree_with(tmp_path: Path, kind: str, message: str) -> None:
    folder = write_lisa(tmp_path, edit=with_projector(layers(16, 20, WIDTH)), config={"mm_projector_type": kind})
    with pytest.raises(CheckpointError, match=message):
        tp.load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.mm_projector.0.weight", "'model.mm_projector.0.weight' is missing"),
        ("model.mm_projector.2.bias", "1 tensor is missing: model.mm_projector.2.bias"),
    ],
)
def test_a_projector_with_a_tensor_missing(tmp_path: Path, name: str, message: str) -> None:
    tensors = {key: tensor for key, tensor in layers(16, 20, WIDTH).items() if key != name}
    with pytest.raises(CheckpointError, match=message):
        tp.load(write_lisa(tmp_path, edit=with_projector(tensors)))


def test_a_projector_with_a_layer_too_many(tmp_path: Path) -> None:
    odd = {**layers(16, 20, WIDTH), "model.mm_projector.1.weight": torch.ones(20)}
    with pytest.raises(CheckpointError, match=r"unexpected: model\.mm_projector\.1\.weight"):
        tp.load(write_lisa(tmp_path, edit=with_projector(odd)))


@pytest.mark.parametrize("family", ["lisa", "glamm"])
def test_towers_of_336_pixels(tmp_path: Path, family: str) -> None:
    """24 × 24 patches of 14 pixels, as CLIP ViT-L/14-336 has them."""
    sizes = {**tower_model().config.to_dict(), "image_size": 336, "patch_size": 14}
    torch.manual_seed(2)
    reference = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    reference.save_pretrained(tmp_path / "tower")
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    model = tp.load(WRITERS[family](tmp_path / "model", tower=False, config=config), vision_tower=tmp_path / "tower")
    encoded = model.encode_image(IMAGE)
    assert encoded.prepared.clip_pixels.shape == (1, 3, 336, 336)
    with torch.no_grad():
        states = reference(encoded.prepared.clip_pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(encoded.tower.features, states[-2][:, 1:], atol=1e-5)
    result = model.segment(encoded, "the cat", tp.strategy("fastv", budget=0.5))
    assert result.trace.ledger.image_tokens == (576,)


# quantised weights and options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRITERS)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, family: str) -> None:
    write = WRITERS[family]
    told = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(
        CheckpointError, match=r"quantised weights \(quantization_config 'bitsandbytes' in config.json\)"
    ):
        tp.load(write(tmp_path / "1", config=told))
    name = "model.layers.0.mlp.up_proj.weight"
    for number, mark in enumerate((f"{name}.absmax", f"{name}.quant_state.bitsandbytes__nf4", name[:-6] + "SCB")):
        folder = write(tmp_path / f"2{number}", edit=lambda state, mark=mark: state.update({mark: torch.ones(3)}))
        with pytest.raises(CheckpointError, match=rf"quantised weights \(the tensor {mark}\)"):
            tp.load(folder)
    folder = write(tmp_path / "3", edit=lambda state: state.update({name: state[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} is stored as int8, expected floating-point numbers"):
        tp.load(folder)
