"""What single families do with their tokens: axes of positions, finer tiles, videos that lose some."""

from __future__ import annotations

import torch
from vlm_families import FAMILIES
from vlm_known import model_of
from vlm_states import states_of
from vlm_watching import Reader, inputs_of, read

from tokenprune.core.reads import (
    Embeddings,
    Projector,
    ReceivedAttention,
    RotaryTables,
    TowerFeatures,
    TowerKeys,
    TowerStates,
)


def test_four_axes_of_positions_are_kept_apart():
    """HunYuan-VL: position, width, height, number of the image."""
    model, inputs = model_of("hunyuan_vl"), inputs_of("hunyuan_vl")
    seen, trace = read(model, Reader(RotaryTables()), inputs)
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}
    places, _ = model.base_model.get_rope_index(**given)
    for row, number in seen["exists"].nonzero().tolist():
        angles = (
            places[:, row, trace.layout.slots[row, number], None] * model.base_model.language_model.rotary_emb.inv_freq
        )
        expected = torch.stack((angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()), 1)
        assert torch.allclose(seen["rotary_tables"][row, number], expected, atol=1e-5)


def test_fine_tiles_have_four_times_the_tokens():
    """Granite Docling's second path for dense pages; here a token for each patch."""
    model, coarse = model_of("granite_docling"), FAMILIES["granite_docling"].inputs([(24, 32)])
    times = torch.where(FAMILIES["granite_docling"].image_tokens(coarse)[0], 4, 1)
    ids = coarse["input_ids"].repeat_interleave(times, 1)
    fine = {**coarse, "input_ids": ids, "attention_mask": torch.ones_like(ids), "tile_fine_mask": torch.ones(1).bool()}
    seen, _ = read(model, Reader(TowerFeatures(), Embeddings(), Projector(), TowerStates(-1, -1)), fine)
    assert torch.allclose(seen["project"](seen["features"]), seen["embeddings"], atol=1e-5)
    assert torch.allclose(seen["tower_states"][0], states_of("granite_docling", coarse)[-1], atol=1e-5)
    tile = [[row, column] for row in range(4) for column in range(4)]
    tiles = int(coarse["pixel_attention_mask"].sum())
    assert tiles > 1
    assert seen["grid"][0].tolist() == tile * tiles
    assert seen["image"][0].tolist() == [number for number in range(tiles) for _ in tile]


def test_tokens_that_a_video_has_lost_are_not_there():
    """VideoLLaMA 3's processor leaves out tokens that show what the frame before shows."""
    model, whole = model_of("video_llama_3"), inputs_of("video_llama_3", "videos")
    reads = TowerFeatures(), ReceivedAttention(), TowerKeys(0), TowerStates(1, -1), Embeddings()
    video = FAMILIES["video_llama_3"].image_tokens(whole)
    kept = torch.arange(int(video.sum())) % 3 != 1
    stay = torch.ones_like(video)
    stay[video] = kept
    less = {**whole, "video_compression_mask": kept}
    for key in ("input_ids", "attention_mask"):
        less[key] = torch.stack([row[places] for row, places in zip(whole[key], stay, strict=True)])
    expected, _ = read(model, Reader(*reads), whole)
    for run in (None, lambda: model.generate(**less, max_new_tokens=2)):
        seen, trace = read(model, Reader(*reads), less, run)
        assert trace.layout.counts.tolist() == [16, 16]
        for field in (*(one.field for one in reads), "grid", "image"):
            assert torch.allclose(seen[field].flatten(0, 1), expected[field].flatten(0, 1)[kept], atol=1e-5), field
