"""A vision tower or a preprocessor that is not the one that the checkpoint tells of is refused, whoever tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glamm_checkpoints import write_glamm
from lisa_checkpoints import State, tower_model, write_lisa, write_tower
from pixellm_checkpoints import PATCH, SQUARE, write_pixellm
from pixellm_checkpoints import tower_model as pixellm_tower
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import CheckpointError

WRITERS: dict[str, Callable[..., Path]] = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}
SIDE, TOWER_PATCH = 32, 8  # of the tiny tower, see `lisa_checkpoints.tower_model`
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": MEAN,
    "image_std": STD,
}


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        tp.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tower(folder: Path, **sizes: Any) -> Path:
    config = {**tower_model().config.to_dict(), **sizes}
    torch.manual_seed(2)
    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["mm_vision_tower", "vision_tower"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai/clip-vit-large-patch14-336", "has 8 pixels to a patch's side, but the tower's name .* says 14"),
        ("/data/clip-vit-base-patch8/", "has 32 pixels to a picture's side, but the tower's name .* says 224"),
        (r"C:\towers\my-clip-patch8-64", "has 32 pixels to a picture's side, but the tower's name .* says 64"),
    ],
)
def test_the_name_in_the_config_tells_patch_and_picture(tmp_path: Path, key: str, name: str, message: str) -> None:
    folder = write_lisa(tmp_path, config={"mm_vision_tower": None, key: name})
    with pytest.raises(CheckpointError, match=message + ".*pass vision_tower="):
        tp.load(folder)


def test_the_name_in_the_config_tells_the_depth_of_openais_towers(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
    projector = {"model.mm_projector.weight": torch.zeros(32, 768)}
    options = {"config": {"mm_vision_tower": "openai/clip-vit-base-patch32"}, "edit": lambda s: s.update(projector)}
    folder = write_lisa(tmp_path / "lisa", tower=False, **options)
    assert "has 3 layers, but the tower's name in config.json, 'clip-vit-base-patch32', says 12" in refusal(
        folder, vision_tower=tower(tmp_path / "shallow", **wide)
    )
    assert tp.load(folder, vision_tower=tower(tmp_path / "deep", **wide, num_hidden_layers=12)).tower_layers == 12


@pytest.mark.parametrize("name", ["nobody/clip-patch8-32", "a-tower", "openai-clip-tiny", "clip-vit-large"])
def test_names_that_agree_or_tell_nothing_are_fine(tmp_path: Path, name: str) -> None:
    assert tp.load(write_lisa(tmp_path, config={"mm_vision_tower": name})).tower_layers == 3


@pytest.mark.parametrize("family", WRITERS)
def test_the_config_tells_the_width(tmp_path: Path, family: str) -> None:
    assert tp.load(WRITERS[family](tmp_path / "1", config={"mm_hidden_size": 16})) is not None
    message = refusal(WRITERS[family](tmp_path / "2", config={"mm_hidden_size": 24}))
    assert "has 16 features per patch, but config.json's mm_hidden_size says 24; pass vision_tower=" in message


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_vision_select_layer": -30}, "layers, but .*config.json says mm_vision_select_layer -30"),
        ({"mm_vision_select_layer": 30}, "layers, but .*config.json says mm_vision_select_layer 30"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch', expected 'patch'"),
    ],
)
def test_features_that_the_tower_does_not_have(tmp_path: Path, family: str, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tp.load(WRITERS[family](tmp_path, config=config))


def copied(source: CLIPVisionModel, prefix: str, **changes: torch.Tensor) -> Callable[[State], None]:
    """Puts a copy of a tower among the tensors."""
    names = {name.removeprefix("vision_model."): tensor.half() for name, tensor in source.state_dict().items()}
    return lambda state: state.update({prefix + name: tensor for name, tensor in {**names, **changes}.items()})


@pytest.mark.parametrize(
    "prefix", ["model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_model."]
)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 64}, "has 17 as a size of embeddings.position_embedding.weight, but the copy .* says 65"),
        ({"patch_size": 16}, "has 8 as a size of embeddings.patch_embedding.weight, but the copy .* says 16"),
        ({"num_hidden_layers": 5}, "has 3 layers, but the copy of the tower in .* says 5"),
        ({"num_hidden_layers": 2}, "has 3 layers, but the copy of the tower in .* says 2"),
        ({"intermediate_size": 40}, "has 24 as a size of encoder.layers.0.mlp.fc1.bias, but the copy .* says 40"),
    ],
)
def test_a_copy_of_the_tower_tells_its_sizes(tmp_path: Path, prefix: str, sizes: Any, message: str) -> None:
    other = CLIPVisionModel(CLIPVisionConfig(**{**tower_model().config.to_dict(), **sizes}))
    with pytest.raises(CheckpointError, match=message):
        tp.load(write_lisa(tmp_path, edit=copied(other, prefix)))


def test_a_copy_of_the_tower_tells_its_weights(tmp_path: Path) -> None:
    same = CLIPVisionModel.from_pretrained(write_tower(tmp_path / "tower"))
    prefix = "model.vision_tower.vision_tower.vision_model."
    found = tp.load(write_lisa(tmp_path / "same", edit=copied(same, prefix)))
    assert torch.equal(found.projector.weight, tp.load(write_lisa(tmp_path / "bare")).projector.weight)
    changes = {"embeddings.class_embedding": same.state_dict()[next(iter(same.state_dict()))].flip(0) + 1}
    message = refusal(write_lisa(tmp_path / "other", edit=copied(same, prefix, **changes)))
    assert "has other weights than the copy of the tower" in message


def test_a_copy_of_pixellms_tower_may_have_been_resized(tmp_path: Path) -> None:
    torch.manual_seed(2)
    same = pixellm_tower()
    prefix = "model.vision_tower.vision_tower.vision_model."
    resized = {"embeddings.position_embedding.weight": torch.zeros(1 + (SQUARE // PATCH) ** 2, 16)}
    for number, changes in enumerate(({}, resized)):
        assert tp.load(write_pixellm(tmp_path / str(number), edit=copied(same, prefix, **changes))) is not None
    other = {"embeddings.position_embedding.weight": torch.zeros(50, 16)}
    assert "the copy of the tower" in refusal(write_pixellm(tmp_path / "x", edit=copied(same, prefix, **other)))


@pytest.mark.parametrize("name", ["resize_vision_tower", "pad_train_clip_images"])
def test_pixellms_trained_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    assert f"says {name} false; only PixelLMs that" in refusal(write_pixellm(tmp_path, config={name: False}))


# preprocessors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lisa", "glamm"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": {"height": 24, "width": 24}}, "makes pictures of 24×24 pixels, but the tower takes 32×32"),
        ({"crop_size": {"height": 32, "width": 40}, "size": 64}, "makes pictures of 40×32 pixels"),
        ({"size": {"shortest_edge": 20}}, "makes pictures of 32×32 (cropped from less) pixels"),
        ({"do_center_crop": False}, "makes pictures of various pixels"),
        ({"do_center_crop": False, "size": {"height": 48, "width": 48}}, "makes pictures of 48×48 pixels"),
        ({"do_normalize": False}, "sets do_normalize to false, but the tower was trained with that step"),
        ({"do_rescale": False}, "sets do_rescale to false, but the tower was trained with that step"),
        ({"do_resize": False}, "sets do_resize to false, but the tower was trained with that step"),
        ({"rescale_factor": 1.0}, "sets rescale_factor to 1.0, expected 1/255"),
        ({"image_std": [0.2, 0, 0.2]}, "says image_std [0.2, 0, 0.2], expected three numbers"),
        ({"image_mean": [0.5]}, "says image_mean [0.5], expected three numbers"),
        ({"image_processor_type": "SiglipImageProcessor"}, "is for SiglipImageProcessor, expected CLIP's"),
        ({"size": {"depth": 3}}, "describes no CLIP image processor"),
    ],
)
def test_a_preprocessor_of_another_tower(tmp_path: Path, family: str, changes: Any, message: str) -> None:
    folder = WRITERS[family](tmp_path)
    file = folder / "vision_tower" / "preprocessor_config.json"
    file.write_text(json.dumps({**PREPROCESSOR, "size": {"shortest_edge": 32}}))
    assert tp.load(folder) is not None
    file.write_text(json.dumps({**PREPROCESSOR, **changes}))
    found = refusal(folder)
    assert message in found
    assert str(file) in found


@pytest.mark.parametrize(("name", "value"), [("image_mean", [0.5, 0.5, 0.5]), ("image_std", [0.5, 0.5, 0.5])])
def test_colours_that_the_checkpoint_does_not_agree_with(tmp_path: Path, name: str, value: list[float]) -> None:
    """Towers of others have colours of their own, which nothing speaks against."""
    other = json.dumps({**PREPROCESSOR, name: value})
    folder = write_lisa(tmp_path / "1")
    (folder / "vision_tower" / "preprocessor_config.json").write_text(other)
    assert tp.load(folder) is not None
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert f"says {name} {value}, but {folder}/preprocessor_config.json has" in refusal(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**json.loads(other), "size": {"shortest_edge": 40}}))
    assert tp.load(folder) is not None
    wider = {**json.loads(other), "size": 48, "crop_size": {"height": 48, "width": 48}}
    (folder / "preprocessor_config.json").write_text(json.dumps(wider))
    assert f"makes pictures of 32×32 pixels, but {folder}/preprocessor_config.json of 48×48" in refusal(folder)

    sizes = {"image_size": 224, "patch_size": 32}
    named = write_lisa(tmp_path / "2", tower=False, config={"mm_vision_tower": "openai/clip-vit-base-patch32"})
    clip = tower(tmp_path / "clip", **sizes)
    square = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (clip / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **square}))
    assert tp.load(named, vision_tower=clip) is not None
    (clip / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **square, name: value}))
    assert f"says {name} {value}, but the tower that config.json names has" in refusal(named, vision_tower=clip)


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava", {"crop_size": {"height": 40, "width": 40}}, "pictures with a side of 40, but"),
        ("paligemma", {"size": {"height": 48, "width": 48}}, "pictures with a side of 48, but"),
        ("gemma3", {"size": {"height": 48, "width": 48}}, "pictures with a side of 48, but"),
        ("qwen2_vl", {"patch_size": 7}, "patches with a side of 7, but"),
        ("qwen2_5_vl", {"merge_size": 4}, "tokens of patches merged by 4, but"),
        ("qwen3_vl", {"temporal_patch_size": 1}, "frames put together by 1, but"),
    ],
)
def test_processors_of_transformers_models(tmp_path: Path, name: str, changes: Any, message: str) -> None:
    folder = write_vlm(tmp_path, name)
    picture = np.zeros((20, 30, 3), np.uint8)
    assert tp.load(folder).inputs(picture, "What?") is not None
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=f"its processor makes {message} the model's vision tower expects"):
        tp.load(folder).answer(picture, "What?")
