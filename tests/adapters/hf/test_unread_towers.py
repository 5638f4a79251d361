"""Families whose vision towers are not read: where their image tokens are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from vlm_cases import inputs_of, model_of
from vlm_configs import IMAGE, TEXT
from vlm_families import FAMILIES, NAMES, READABLE
from vlm_watching import CASES, Reader, read

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
    "ovis2": (3, 3),
    "deepseek_vl_hybrid": (4, 4),
}
COUNTS = {"aria": 9, "idefics2": 9}  # learned queries, which have no place
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
    crops = inputs["num_local_patches"].tolist() if name == "step3p7" else []
    shapes = iter([shape for count in crops for shape in [*[(2, 2)] * count, (3, 3)]])
    batch = []
    for count in FAMILIES[name].image_tokens(inputs).sum(1).tolist():
        cells, number = [], 0
        while len(cells) < count:
            if name in COUNTS:
                cells += [(number, -1, -1)] * COUNTS[name]
            else:
                rows, columns = next(shapes) if name == "step3p7" else GRIDS[name]
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
    assert torch.equal(trace.layout.image_tokens, FAMILIES[name].image_tokens(inputs))
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
