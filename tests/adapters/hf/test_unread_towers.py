"""Families whose vision towers are not read: where their image tokens are, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from vlm_cases import inputs_of, model_of
from vlm_configs import IMAGE, TEXT
from vlm_families import FAMILIES, NAMES, READABLE
from vlm_inputs import fixed
from vlm_known import CASES
from vlm_watching import Reader, read, separators

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.reads import AttentionFrom, Projector, ReceivedAttention, TowerFeatures
from tokenprune.core.stage import Stage
from tokenprune.errors import IncompatibleError, InputError
from tokenprune_adapters.hf.families import FAMILIES as KNOWN
from tokenprune_adapters.hf.families import NO_TOWER

UNREAD = [name for name in NAMES if name not in READABLE]
GRIDS = {
    "got_ocr2": (4, 4),
    "pp_chart2table": (4, 4),
    "llama4": (3, 3),
    "chameleon": (4, 4),
    "fast_vlm": (4, 4),
    "perception_lm": (3, 3),
    "emu3": (4, 6),
}
SIDES = {  # of each image, and how many of their units a token has
    "lfm2_vl": ("spatial_shapes", 2),
    "lfm3_vl": ("image_grid_thw", 2),
    "minicpmv4_6": ("target_sizes", 4),
    "minicpmv4_7": ("target_sizes", 4),
    "minicpm_ocr": ("target_sizes", 2),
    "gemma4_unified": ("image_position_ids", 1),
    "gemma4": ("image_position_ids", 2),
    "step3p7": ("num_local_patches", 1),
}
COUNTS = {"aria": 9, "idefics2": 9, "deepseek_ocr2": 9}  # learned queries, which have no place
names = pytest.mark.parametrize("name", UNREAD)


class Half(Reader):
    """Keeps the half that the last row attends to most."""

    name = "half"

    def stages(self, shape):
        return [Stage("attention", 2, reads=AttentionFrom("last"))]

    def choose(self, stage, tokens):
        return Keep.top(tokens.attention.masked_fill(~tokens.active, float("-inf")), tokens.count(0.5))


def expected_cells(name, inputs):
    """Per row, (image number, row, column) of every image token, by what the family is known for."""
    found = FAMILIES[name].image_tokens(inputs) & ~separators(name, model_of(name), inputs)
    field, unit = SIDES.get(name, ("", 1))
    sizes = iter(inputs[field].tolist() if name in SIDES else [])
    if name.startswith("gemma4"):
        sizes = iter([(place.amax(0).flip(0) + 1).tolist() for place in inputs[field]])
    elif name == "step3p7":  # crops of an image, then the whole one
        sizes = iter([size for count in inputs[field].tolist() for size in [*[(2, 2)] * count, (3, 3)]])
    batch = []
    for count in found.sum(1).tolist():
        cells, number = [], 0
        while len(cells) < count:
            if name in COUNTS:
                cells += [(number, -1, -1)] * COUNTS[name]
            else:
                rows, columns = [side // unit for side in next(sizes)[-2:]] if name in SIDES else GRIDS[name]
                cells += [(number, row, column) for row in range(rows) for column in range(columns)]
            number += 1
        batch.append(cells)
    return batch


@names
@pytest.mark.parametrize("case", ["two sizes", "several images"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_image_tokens_pictures_and_cells(name, case, padding):
    inputs = FAMILIES[name].inputs(CASES[case], padding=padding)
    seen, trace = read(model_of(name), Reader(), inputs)
    separator = separators(name, model_of(name), inputs)
    assert torch.equal(trace.layout.image_tokens, FAMILIES[name].image_tokens(inputs) & ~separator)
    for row, cells in enumerate(expected_cells(name, inputs)):
        found = torch.cat((seen["image"][row, :, None], seen["grid"][row]), 1)
        assert found[: len(cells)].tolist() == [list(cell) for cell in cells]
        assert not seen["exists"][row, len(cells) :].any()


@names
def test_forward_and_generate_prune_alike(name):
    model, inputs = model_of(name), inputs_of(name)
    _, forward = read(model, Half(), inputs)
    _, generated = read(model, Half(), inputs, lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
    assert [stage.kept for stage in forward.stages] == [stage.kept for stage in generated.stages]
    assert forward.ledger.entries == generated.ledger.entries


@names
@pytest.mark.parametrize("wanted", [TowerFeatures(), ReceivedAttention(), Projector()], ids=str)
def test_reads_of_the_tower_are_refused_before_anything_runs(name, wanted):
    with (
        pytest.raises(IncompatibleError, match=type(wanted).__name__),
        tokenprune.prune(model_of(name), Reader(wanted)),
    ):
        pytest.fail("the context was opened")
    assert NO_TOWER in KNOWN[model_of(name).config.model_type].limits


@names
def test_placeholders_that_do_not_match_the_images(name):
    model, inputs = model_of(name), inputs_of(name)
    ids = inputs["input_ids"].clone()
    ids[1, (ids[1] == IMAGE).nonzero()[0]] = TEXT.start
    total = int(FAMILIES[name].image_tokens(inputs).sum())
    with (
        torch.no_grad(),
        pytest.raises(InputError, match=f"has {total - 1} image tokens, .* have {total} features"),
        tokenprune.prune(model, Half()),
    ):
        model(**{**inputs, "input_ids": ids})


TIMM = {
    "perception_lm": {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 24, "patch_size": 4, "global_pool": ""},
    },
    "fast_vlm": {
        "architecture": "fastvit_t8",
        "hidden_size": 32,
        "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
    },
}


@pytest.mark.parametrize("name", TIMM)
def test_towers_of_timm_give_the_same_image_tokens(name):
    """Released checkpoints have them; timm needs torchvision."""
    pytest.importorskip("timm", reason="the package timm is not installed")
    own = FAMILIES[name]
    see = fixed("SiglipImageProcessor", 128, 16) if name == "fast_vlm" else own.see
    family = replace(own, config=partial(own.config, model_type="timm_wrapper", **TIMM[name]), see=see)
    model, inputs = family.build(), family.inputs(CASES["two sizes"])
    _, trace = read(model, Half(), inputs)
    assert torch.equal(trace.layout.image_tokens, family.image_tokens(inputs))
    assert torch.equal(trace.layout.grid, read(model_of(name), Half(), inputs_of(name))[1].layout.grid)


def test_large_views_have_more_queries():
    """DeepSeek-OCR 2 has 256 for views of more than 144 patches."""
    model, tile, whole = model_of("deepseek_ocr2"), 9, 256
    ids = torch.tensor([[*TEXT[:3], *[IMAGE] * (tile + whole + 1), *TEXT[:5]]])
    views = {"pixel_values": torch.randn(1, 3, 208, 208), "pixel_values_local": torch.randn(1, 3, 16, 16)}
    _, trace = read(model, Reader(), {"input_ids": ids, **views, "num_local_patches": torch.tensor([1])})
    layout = trace.layout
    assert layout.image_number[layout.image_tokens].bincount().tolist() == [tile, whole]
