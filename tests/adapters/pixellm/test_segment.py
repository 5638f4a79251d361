"""PixelLM's `segment`, its padded grid, and strategies on it, with a tiny model and random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from clip_checkpoints import whole_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from pixellm_checkpoints import SQUARE, write_pixellm
from torch.nn import functional

import tokenprune as tp
from tokenprune.core.reads import Pixels, TowerStates
from tokenprune.core.trace import Trace
from tokenprune.errors import InputError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.evaluation.samples import run_single
from tokenprune.report.overlays import inspection_sheet
from tokenprune_adapters.llava.prompt import IMAGE_ID
from tokenprune_adapters.pixellm import PixelLMModel
from tokenprune_adapters.pixellm.results import PreparedImage
from tokenprune_adapters.pixellm.tower import PixelTowerRun, Visible
from tokenprune_adapters.segmentation.data import SegmenterInputs
from tokenprune_adapters.segmentation.sam.masks import MaskSizes, resized_size

QUERIES = ["the cat", "the thing that is behind the red car", "Which of these can swim?"]
SHAPES = {"landscape": (45, 70), "portrait": (70, 30), "square": (50, 50), "thin": (3, 90)}
CELLS = {"landscape": (11, 16), "portrait": (16, 7), "square": (16, 16), "thin": (1, 16)}
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in tp.strategies()),
    ("uniform", {"budget": 0.5}),
    ("csp", {"budget": 0.6, "clustering": "uniform"}),
    ("csp", {"budget": 0.6, "clustering": "random"}),
    ("csp", {"budget": 0.6, "clustering": "cls_attention", "query": "seg"}),
    ("csp", {"budget": 0.6, "clustering": "seg_first", "reentry": "delta"}),
    ("csp", {"budget": 0.6, "clustering": "kmeans"}),
    ("fastv", {"budget": 0.6}),
    ("prumerge+", {"budget": 0.5}),
]
NAMES = [" ".join(map(str, (name, *options.values()))) for name, options in STRATEGIES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PixelLMModel:
    folder = write_pixellm(tmp_path_factory.mktemp("pixellm"))
    whole_clip(folder / "vision_tower")
    loaded: PixelLMModel = tp.load(folder)
    return loaded


def picture(shape: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (*SHAPES[shape], 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_aspect(model: PixelLMModel, shape: str) -> None:
    image = picture(shape)
    height, width = SHAPES[shape]
    encoded = model.encode_image(image)
    result = model.segment(encoded, QUERIES)
    assert (result.masks.shape, result.masks.dtype) == ((3, height, width), torch.bool)
    assert (result.low_res_logits.shape, result.query_index) == ((3, 128, 128), [0, 1, 2])
    rows, columns = encoded.tower.visible.shape
    assert (rows, columns) == CELLS[shape]
    inputs = model.build_inputs(encoded, QUERIES)
    sequence = inputs.sequence
    assert sequence.image_tokens.sum(1).tolist() == [rows * columns] * 3
    assert (sequence.token_ids == IMAGE_ID).sum(1).tolist() == [256] * 3
    padded = (sequence.token_ids == IMAGE_ID) & ~sequence.image_tokens
    assert not bool(sequence.attention_mask[padded].any())
    assert (encoded.image_valid is None) == (shape == "square")


@pytest.mark.parametrize("shape", ["landscape", "portrait", "square"])
def test_padding_is_not_seen(model: PixelLMModel, shape: str) -> None:
    image = picture(shape)
    with torch.inference_mode():
        encoded = model.encode_image(image)
        prepared = encoded.prepared
        patches = encoded.tower.visible.patches
        padded = ~patches.repeat_interleave(2, 0).repeat_interleave(2, 1)  # patches are 2×2 pixels
        noise = torch.where(padded, 3.0, prepared.pixels)
        other = model.encode_image(PreparedImage(noise, prepared.sizes))
    shown = encoded.tower.visible.patches.flatten()
    before, after = (one.tower.patches.states[-1][:, 1:] for one in (encoded, other))
    assert torch.equal(before[:, shown], after[:, shown])
    for name, value in reads(encoded).items():
        if name != "features":  # the bilinear resize looks at padding on purpose
            assert torch.allclose(value, reads(other)[name], atol=1e-6), name
    assert bool(padded.any()) == (shape != "square")


def reads(encoded: Any) -> dict[str, torch.Tensor]:
    tower = encoded.tower
    return {
        "features": tower.features,
        "cls": tower.cls_attention(-1),
        "joint": tower.cls_attention(-1, "joint"),
        "received": tower.received_attention(-1),
        "keys": tower.keys(-1),
        "states": tower.mean_state(TowerStates(0, -1)),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_reads_line_up_with_the_visible_cells(model: PixelLMModel, shape: str) -> None:
    with torch.inference_mode():
        encoded = model.encode_image(picture(shape))
    tower = encoded.tower
    rows, columns = tower.visible.shape
    for name, value in reads(encoded).items():
        assert value.shape[:2] == (1, rows * columns), name
        assert bool(torch.isfinite(value).all()), name
    with torch.inference_mode():
        projected = model.projector(tower.features)
    assert torch.allclose(projected, encoded.image_embeddings[:, tower.visible.cells.flatten()], atol=1e-6)
    source = model.vision_source(encoded, 2)
    assert source.provide(Pixels()).shape == (2, rows * SQUARE // 16, columns * SQUARE // 16, 3)


def cells(tower: PixelTowerRun, values: torch.Tensor) -> torch.Tensor:
    """[n, C]: mean over the visible patches of each visible cell, of values [visible patches, C], by hand."""
    grid = torch.full((32, 32, values.shape[-1]), float("nan"))
    grid[tower.visible.patches] = values
    return grid.unflatten(0, (16, 2)).unflatten(2, (16, 2)).nanmean((1, 3))[tower.visible.cells]


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_by_hand(model: PixelLMModel, shape: str) -> None:
    with torch.inference_mode():
        tower = model.encode_image(picture(shape)).tower
    keys = tower.patches.seen(-1).key[0].transpose(0, 1).flatten(1)[1:]
    assert torch.allclose(tower.keys(-1)[0], cells(tower, keys[tower.visible.patches.flatten()]), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_states_by_hand(model: PixelLMModel, shape: str) -> None:
    with torch.inference_mode():
        tower = model.encode_image(picture(shape)).tower
    mean = torch.stack(tower.patches.states[1:]).mean(0)[0, 1:]
    found = tower.mean_state(TowerStates(1, -1))[0]
    assert torch.allclose(found, cells(tower, mean[tower.visible.patches.flatten()]), atol=1e-5)


def test_cls_attention_by_hand(model: PixelLMModel) -> None:
    with torch.inference_mode():
        tower = model.encode_image(picture("landscape")).tower
    seen = tower.patches.seen(-1)
    shown = functional.pad(tower.visible.patches.flatten(), (1, 0), value=True)
    query, key = seen.query[0, :, :1], seen.key[0][:, shown]
    joint = query.transpose(0, 1).flatten(1)[None], key.transpose(0, 1).flatten(1)[None]
    for heads, (q, k) in {"mean": (query, key), "joint": joint}.items():
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)[0, 1:]
        assert torch.allclose(tower.cls_attention(-1, heads)[0], cells(tower, weights[:, None])[:, 0], atol=1e-6)


def test_received_attention_by_hand(model: PixelLMModel) -> None:
    with torch.inference_mode():
        tower = model.encode_image(picture("landscape")).tower
    seen = tower.patches.seen(-1)
    shown = functional.pad(tower.visible.patches.flatten(), (1, 0), value=True)
    query, key = seen.query[0][:, shown], seen.key[0][:, shown]
    weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1).mean((0, 1))[1:]
    assert torch.allclose(tower.received_attention(-1)[0], cells(tower, weights[:, None])[:, 0], atol=1e-6)


@pytest.mark.parametrize(("name", "options"), STRATEGIES, ids=NAMES)
def test_every_strategy_runs_and_rows_are_independent(model: PixelLMModel, name: str, options: dict[str, Any]) -> None:
    encoded = model.encode_image(picture("landscape"))
    strategy = tp.strategy(name, **options)
    together = model.segment(encoded, QUERIES, strategy=strategy)
    for row, query in enumerate(QUERIES):
        alone = model.segment(encoded, query, strategy=strategy)
        assert torch.allclose(alone.mask_logits[0], together.mask_logits[row], atol=1e-4)
    assert together.trace is not None
    assert together.trace.ledger.image_tokens == (11 * 16,) * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_all_changes_nothing(model: PixelLMModel, shape: str) -> None:
    encoded = model.encode_image(picture(shape))
    one, plain = model.segment(encoded, QUERIES[0]), model.segment(encoded, QUERIES)
    for name, options in (("none", {}), ("uniform", {"keep": 1.0}), ("fastv", {"keep": 1.0})):
        strategy = tp.strategy(name, **options)
        assert torch.equal(one.mask_logits, model.segment(encoded, QUERIES[0], strategy).mask_logits)
        # what several prompts have in common is computed once, but not where attention is read: rounding differs
        kept = model.segment(encoded, QUERIES, strategy)
        assert torch.allclose(plain.mask_logits, kept.mask_logits, atol=1e-5)
    generated = model.segment(encoded, QUERIES, answer="generate", max_new_tokens=3)
    again = model.segment(encoded, QUERIES, tp.strategy("none"), answer="generate", max_new_tokens=3)
    assert generated.text == again.text


def visible_keys(inputs: SegmenterInputs, trace: Trace) -> torch.Tensor:
    """int64 [rows, S]: the attention mask with the image tokens that a one-stage strategy drops at layer 0 hidden."""
    mask = inputs.sequence.attention_mask.clone()
    for row, slots in enumerate(trace.layout.slots):
        mask[row, slots[~trace.stages[0].active[row]]] = 0
    return mask


@torch.inference_mode()
def test_pruning_equals_masking(model: PixelLMModel) -> None:
    inputs = model.build_inputs(picture("landscape"), QUERIES)
    states, trace = model.run_decoder(inputs, tp.strategy("uniform", keep=0.4))
    assert trace is not None
    sequence, mask = inputs.sequence, visible_keys(inputs, trace)
    assert int(sequence.image_tokens.sum() - (sequence.image_tokens & mask.bool()).sum()) == 3 * (176 - 70)
    wanted = model.decoder.model(inputs_embeds=sequence.inputs_embeds, attention_mask=mask, use_cache=False)
    read = sequence.mask_query
    assert torch.allclose(states[read], wanted.last_hidden_state[read], atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("shape", ["landscape", "square"])
def test_cached_generation_equals_recomputation(model: PixelLMModel, shape: str) -> None:
    encoded = model.encode_image(picture(shape))
    inputs = model.inputs_of(model.prompts(QUERIES, answer="generate"), encoded, continues=True)
    generated, trace = model.run_generation(inputs, tp.strategy("uniform", keep=0.4), max_new_tokens=4)
    assert trace is not None
    sequence, mask = inputs.sequence, visible_keys(inputs, trace)
    assert sequence.positions is not None
    new = torch.tensor([ids[:3] for ids in generated.ids])
    assert new.shape == (3, 3)
    positions = sequence.positions[:, -1:] + torch.arange(1, 4)
    output = model.decoder.model(
        inputs_embeds=torch.cat((sequence.inputs_embeds, model.decoder.get_input_embeddings()(new)), 1),
        attention_mask=torch.cat((mask, torch.ones_like(new)), 1),
        position_ids=torch.cat((sequence.positions, positions), 1),
        use_cache=False,
    )
    assert torch.allclose(generated.states, output.last_hidden_state[:, -4:], atol=1e-4)


def test_grid_cells_of_the_trace(model: PixelLMModel) -> None:
    encoded = model.encode_image(picture("portrait"))
    result = model.segment(encoded, QUERIES, strategy=tp.strategy("fastv", budget=0.5))
    assert result.trace is not None
    layout = result.trace.layout
    cells = layout.gather_slots(layout.grid)
    rows, columns = encoded.tower.visible.shape
    wanted = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    assert columns < rows == 16
    assert all(torch.equal(row, wanted) for row in cells)
    assert layout.gather_slots(layout.image_number).unique().tolist() == [0]


def test_attention_is_read_from_all_six_tokens(model: PixelLMModel) -> None:
    with torch.inference_mode():
        inputs = model.build_inputs(picture("landscape"), QUERIES)
    sequence = inputs.sequence
    assert sequence.mask_query.sum(1).tolist() == [6] * 3
    assert torch.equal(sequence.mask_query[:, :-1], sequence.seg[:, 1:])


@given(st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_visible_cells_cover_the_image(height: int, width: int) -> None:
    sizes = MaskSizes((height, width), resized_size(height, width, 448), 448)
    visible = Visible.of(sizes, 32)
    rows, columns = visible.shape
    assert max(rows, columns) == 16
    assert bool(visible.cells[:rows, :columns].all())
    assert int(visible.cells.sum()) == rows * columns
    assert (rows - 1) * 28 < sizes.resized[0] <= rows * 28
    assert (columns - 1) * 28 < sizes.resized[1] <= columns * 28
    patches = visible.patches
    assert int(patches[:, 0].sum()) == -(-sizes.resized[0] // 14)
    assert int(patches[0].sum()) == -(-sizes.resized[1] // 14)


def test_grid_box(model: PixelLMModel) -> None:
    assert model.grid_box(50, 50) == (0.0, 0.0, 50.0, 50.0)
    top, left, bottom, right = model.grid_box(45, 70)  # resized to 41×64: 11 rows of 4 pixels
    assert (top, left, right) == (0.0, 0.0, 70.0)
    assert bottom == pytest.approx(44 * 45 / 41)


def codebook(model: PixelLMModel, said: str) -> int:
    image = picture("square")
    prompt = f"USER: <image> ASSISTANT: {said}</s>"
    return len(model.segment(image, prompt=prompt).masks)


def test_a_mask_for_each_complete_codebook(model: PixelLMModel) -> None:
    whole = " ".join(f"[SEG{i}]" for i in range(6))
    assert codebook(model, f"{whole} and {whole}.") == 2
    assert codebook(model, f"[SEG0] [SEG1] {whole}") == 1
    assert codebook(model, f"{whole} [SEG0] [SEG1]") == 1
    with pytest.raises(InputError, match=r"contains no \[SEG0\] \[SEG1\]"):
        codebook(model, "[SEG0] [SEG1] [SEG2] [SEG4] [SEG3] [SEG5]")
    with pytest.raises(InputError, match=r"contains \[SEG3\]"):
        model.segment(picture("square"), "the [SEG3]")


def test_two_masks_of_one_answer(model: PixelLMModel) -> None:
    whole = " ".join(f"[SEG{i}]" for i in range(6))
    encoded = model.encode_image(picture("landscape"))
    with torch.inference_mode():
        inputs = model.inputs_of([f"USER: <image> ASSISTANT: {whole} and {whole}.</s>"], encoded)
        states, _ = model.run_decoder(inputs)
        read = states[0][inputs.sequence.mask_query[0]]
        wanted = torch.cat([model.low_res_logits(part, encoded)[0] for part in read.split(6)])
    result = model.segment(encoded, prompt=inputs.prompts)
    assert torch.allclose(result.low_res_logits, wanted, atol=1e-4)
    assert result.query_index == [0, 0]


def test_generation_without_a_mask(model: PixelLMModel) -> None:
    result = model.segment(picture("landscape"), QUERIES[:1], answer="generate", max_new_tokens=2)
    assert (result.masks.shape, result.query_index) == ((0, 45, 70), [])


def test_gradients_reach_the_weights(model: PixelLMModel) -> None:
    inputs = model.build_inputs(picture("landscape"), QUERIES[:1])
    states, _ = model.run_decoder(inputs)
    low_res, _ = model.low_res_logits(states[inputs.sequence.mask_query], inputs.encoded)
    low_res.sum().backward()
    for part in (model.projector, model.mask_projector, model.mask_projection, model.pixel_decoder.image_feature_neck):
        assert all(parameter.grad is not None for parameter in part.parameters())
    model.zero_grad()


def test_the_model_can_be_compared(model: PixelLMModel) -> None:
    assert isinstance(model, SegmentationModel)
    result = tp.compare(model, "shapes", ["none", "uniform", "csp"], budget=0.5, limit=2, timing_samples=0)
    by_name = {row.strategy: row for row in result.rows}
    assert by_name["none"].agreement == pytest.approx(1.0)
    assert by_name["uniform"].equivalent_tokens == 128
    assert by_name["csp"].equivalent_tokens <= 128


def test_pictures_of_tokens_have_the_size_of_the_image(model: PixelLMModel) -> None:
    record = run_single(model, picture("landscape"), QUERIES[0], tp.strategy("prumerge+"))
    for axis in inspection_sheet(record).axes:
        if axis.images and axis.get_title() and "scores" not in axis.get_title():
            bottom, top = axis.get_ylim()
            assert (top, bottom) == (-0.5, 44.5), axis.get_title()  # the last row of cells reaches to 48
