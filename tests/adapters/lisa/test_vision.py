"""What LISA's vision side offers to strategies, against plain computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lisa_checkpoints import write_lisa, write_tower
from PIL import Image
from transformers import CLIPVisionModel

from tokenprune.core.reads import (
    ClsAttention,
    ClsFeatures,
    ClsQuery,
    Crops,
    Pixels,
    Projector,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)
from tokenprune.errors import InputError, PluginError
from tokenprune_adapters.clip.tower import ClipPixels, load_tower, processor_class
from tokenprune_adapters.lisa import LisaModel
from tokenprune_adapters.lisa.adapter import LisaAdapter
from tokenprune_adapters.llava.vision import TowerRun, run_tower, vision_source

SIDE = 32  # of the tiny tower's input


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tower_run(folder: Path, pixels: torch.Tensor) -> TowerRun:
    return run_tower(load_tower(folder, torch.float32), pixels)


@pytest.fixture(scope="module")
def eager(folder: Path) -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_loaded_tower_is_the_saved_one(tower_run: TowerRun, eager: CLIPVisionModel, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        states = eager(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(tower_run.states) == 4
    assert torch.allclose(tower_run.features, states[-2][:, 1:], atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_cls_attention_equals_eager_attention(
    tower_run: TowerRun, eager: CLIPVisionModel, pixels: torch.Tensor, layer: int
) -> None:
    with torch.inference_mode():
        weights = eager(pixels, output_attentions=True).attentions[layer]
    assert torch.allclose(tower_run.cls_attention(layer), weights[:, :, 0, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize("layer", [0, -1])
def test_received_attention_equals_eager_attention(
    tower_run: TowerRun, eager: CLIPVisionModel, pixels: torch.Tensor, layer: int
) -> None:
    with torch.inference_mode():
        weights = eager(pixels, output_attentions=True).attentions[layer]
    assert torch.allclose(tower_run.received_attention(layer), weights.mean((1, 2))[:, 1:], atol=1e-5)


def test_keys_and_joint_attention_equal_the_projections(tower_run: TowerRun, eager: CLIPVisionModel) -> None:
    block = getattr(eager, "vision_model", eager).encoder.layers[1]
    entering = block.layer_norm1(tower_run.states[1])
    query, keys = block.self_attn.q_proj(entering)[0, 0], block.self_attn.k_proj(entering)[0]
    assert torch.allclose(tower_run.keys(1), keys[None, 1:], atol=1e-5)
    assert torch.allclose(tower_run.keys(1, "mean")[0], keys[1:].unflatten(1, (2, 8)).mean(1), atol=1e-5)
    assert torch.allclose(tower_run.values(1), block.self_attn.v_proj(entering)[:, 1:], atol=1e-5)
    assert torch.allclose(tower_run.cls_query(1)[0, 0], query, atol=1e-5)
    assert torch.equal(tower_run.cls_features, tower_run.states[-2][:, :1])
    joint = (keys @ query / len(query) ** 0.5).softmax(0)[1:]
    assert torch.allclose(tower_run.cls_attention(1, "joint")[0], joint, atol=1e-5)
    with pytest.raises(PluginError, match="ClsAttention: heads='sum' is not known; expected 'mean' or 'joint'"):
        ClsAttention(1, "sum")
    with pytest.raises(PluginError, match="TowerKeys: heads='sum' is not known; expected 'joint' or 'mean'"):
        TowerKeys(1, "sum")


def test_the_mean_state_is_that_of_the_towers_hidden_states(tower_run: TowerRun) -> None:
    states = torch.stack(tower_run.states)
    reads = {
        TowerStates(): [3],
        TowerStates(-1, -1): [3],
        TowerStates(-2, -2): [2],
        TowerStates(0, 3): [0, 1, 2, 3],
        TowerStates(1, -2): [1, 2],
        TowerStates(2 / 3, -1): [2, 3],
        TowerStates(0.2, 0.5): [1, 2],
    }
    for read, numbers in reads.items():
        assert list(read.numbers(3)) == numbers
        assert torch.allclose(tower_run.mean_state(read), states[numbers].mean(0)[:, 1:], atol=1e-6)
    assert torch.equal(tower_run.mean_state(TowerStates(-2, -2)), tower_run.features)
    with pytest.raises(InputError, match="tower states 1 to 4 were requested, but the vision tower has 3 layers"):
        tower_run.mean_state(TowerStates(1, 4))


@pytest.mark.parametrize(("first", "last"), [(0, 4), (-5, 3), (2, 1), (0.9, 0.1), (3, 0.5)])
def test_states_that_a_tower_does_not_have_are_refused(first: float, last: float) -> None:
    with pytest.raises(InputError, match="the vision tower has 3 layers, states 0 … 3"):
        TowerStates(first, last).numbers(3)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_share_of_the_depth_is_between_0_and_1(share: float) -> None:
    with pytest.raises(PluginError, match="is not a share between 0 and 1; use an int for a number"):
        TowerStates(share, -1)


def test_a_layer_is_computed_once(folder: Path, pixels: torch.Tensor) -> None:
    run = run_tower(load_tower(folder, torch.float32), pixels)
    assert run.seen(-1) is run.seen(2)
    with pytest.raises(InputError, match="tower layer 3 was requested, but the vision tower has 3 layers"):
        run.seen(3)
    with pytest.raises(InputError, match="tower layer -4"):
        run.seen(-4)


def test_answers_line_up_with_the_rows(tower_run: TowerRun) -> None:
    picture = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    source = vision_source(tower_run, torch.nn.Linear(16, 5), lambda: picture, rows=3)
    shapes = {
        TowerFeatures(): (3, 16, 16),
        ClsAttention(): (3, 16),
        ReceivedAttention(-2): (3, 16),
        TowerKeys(0): (3, 16, 16),
        TowerKeys(0, "mean"): (3, 16, 8),
        TowerValues(0): (3, 16, 16),
        TowerStates(0, -1): (3, 16, 16),
        ClsFeatures(): (3, 16, 16),
        ClsQuery(0): (3, 16, 16),
        Crops(): (3, 16),
        Pixels(): (3, SIDE, SIDE, 3),
    }
    for read, shape in shapes.items():
        assert type(read) in source.answers
        assert source.provide(read).shape == shape
    assert source.provide(Projector())(torch.zeros(2, 7, 16)).shape == (2, 7, 5)
    assert source.layers == 3


@pytest.mark.parametrize("size", [(40, 40), (33, 90), (120, 35), (8, 9)])
def test_pictures_come_back_exactly(folder: Path, size: tuple[int, int]) -> None:
    processor = ClipPixels(folder, load_tower(folder, torch.float32))
    values = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    plain = processor_class()(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_rescale=False, do_normalize=False
    )
    wanted = np.asarray(plain(images=Image.fromarray(values))["pixel_values"][0]).transpose(1, 2, 0)
    found = processor.picture(processor(Image.fromarray(values)))
    assert np.array_equal(found[0].numpy(), wanted)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LisaModel:
    return LisaAdapter.load(str(write_lisa(tmp_path_factory.mktemp("lisa"))))


@given(height=st.integers(8, 400), width=st.integers(8, 400))
@settings(deadline=None, max_examples=60)
def test_the_grid_box_is_the_middle_square(model: LisaModel, height: int, width: int) -> None:
    top, left, bottom, right = model.grid_box(height, width)
    short = min(height, width)
    pixel = short / SIDE  # the crop starts at a whole pixel of the resized image
    assert bottom - top == pytest.approx(short, abs=pixel)
    assert right - left == pytest.approx(short, abs=pixel)
    assert (top + bottom) / 2 == pytest.approx(height / 2, abs=pixel)
    assert (left + right) / 2 == pytest.approx(width / 2, abs=pixel)
    assert min(top, left) >= 0


def test_the_grid_box_without_a_crop(folder: Path, tmp_path: Path) -> None:
    options = '{"do_center_crop": false, "size": {"height": 32, "width": 32}}'
    (tmp_path / "preprocessor_config.json").write_text(options)
    assert ClipPixels(tmp_path, load_tower(folder, torch.float32)).box(40, 90) == (0.0, 0.0, 40.0, 90.0)
