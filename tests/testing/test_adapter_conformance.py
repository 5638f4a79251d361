"""transformers' own families pass the kit for adapters; an adapter with a mistake in it fails the test for it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import vlm_families
import vlm_oracle
from vlm_configs import BOS

from tokenprune.core.reads import TowerFeatures
from tokenprune.engine import BoundModel, VisionCapture
from tokenprune.errors import InputError, PluginError
from tokenprune.testing.adapter_conformance import AdapterConformance
from tokenprune.testing.kit.grid_checks import check_cells
from tokenprune_adapters.hf import TransformersAdapter
from tokenprune_adapters.hf.families import ROWS_DIFFER

SIZES = [(24, 32), [(40, 20), (24, 24)]]


class Family(AdapterConformance):
    """The kit on the tiny model of a family of transformers."""

    adapter = "transformers"
    family: vlm_families.Family

    def model(self):
        return self.family.build()

    def inputs(self, rows):
        return self.family.inputs([SIZES[row] for row in rows], first=rows[0])

    def text(self):
        ids = torch.tensor([[BOS, 20, 21, 22, 23]])
        return self.family.finish({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def longer(self, inputs, new):
        return vlm_oracle.grown(inputs, new)


@pytest.mark.parametrize("family", vlm_families.NAMES)
class TestFamilies(Family):
    @pytest.fixture(autouse=True)
    def _chosen(self, family):
        self.family = vlm_families.FAMILIES[family]

    def test_image_tokens_and_cells_fit_together(self):
        if self.family.name in ("idefics2", "aria", "deepseek_ocr2"):
            pytest.skip(f"the image tokens of {self.family.name} are learned queries, which have no cells")
        super().test_image_tokens_and_cells_fit_together()

    def test_batch_row_equals_row_alone(self):
        if self.family.name == "hunyuan_vl":
            pytest.skip(ROWS_DIFFER)
        super().test_batch_row_equals_row_alone()


# mistakes ------------------------------------------------------------------------------------------------------------


class Mistaken(BoundModel, VisionCapture):
    """A binding that changes what another says."""

    def __init__(self, inner, marks=None, answer=None, leave=False):
        self.inner, self.name, self.decoder = inner, inner.name, inner.decoder
        self.tower_layers, self.leave = inner.tower_layers, leave
        self.change_marks = marks or (lambda marks: marks)
        self.change_answer = answer or (lambda answer: answer)

    def offers(self):
        return frozenset({TowerFeatures})

    @contextmanager
    def capture(self, reads):
        with self.inner.capture(reads) as self.watched:
            if self.leave:
                self.decoder.register_forward_hook(lambda *_: None)
            yield self

    def prompt_masks(self, queries):
        return self.change_marks(self.watched.prompt_masks(queries))

    def provide(self, read):
        return self.change_answer(self.watched.provide(read))


def no_padding(marks):
    return replace(marks, attention_mask=torch.ones_like(marks.attention_mask))


def one_cell(marks):
    return replace(marks, grid=torch.zeros_like(marks.grid))


def none_in_the_last_row(marks):
    rows = torch.arange(len(marks.image_tokens))[:, None]
    return replace(marks, image_tokens=marks.image_tokens & ((rows < 1) | (len(rows) < 2)))


def image_of_the_batch(marks):
    return replace(marks, image_number=torch.where(marks.image_number < 0, -1, marks.image_number + 1))


def columns_first(marks):
    return replace(marks, grid=marks.grid.flip(-1))


def a_separator_too(marks):
    image = marks.image_tokens
    before = ~image & image.roll(-1, 1)
    return replace(marks, image_tokens=image | before, grid=None, image_number=None)


CELLS, ANSWERS = "image_tokens_and_cells_fit_together", "vision_side_answers_for_each_token"
MISTAKES = {
    "padding": (CELLS, {"marks": no_padding}, "tokens that are not padding in the batch 49, alone "),
    "one_cell": (CELLS, {"marks": one_cell}, "image tokens in a cell that another one of the image has"),
    "no_tokens": (CELLS, {"marks": none_in_the_last_row}, "prompt 1: no image token is marked"),
    "transposed": (
        CELLS,
        {"marks": columns_first},
        "prompt 0, image 0: cells do not run row by row in the order of the p",
    ),
    "separator": (CELLS, {"marks": a_separator_too}, "prompt 0: an image token without a cell; found .* separator"),
    "numbers": (CELLS, {"marks": image_of_the_batch}, "images must be numbered from 0; found"),
    "order": (ANSWERS, {"answer": lambda a: a.flip(1)}, "TowerFeatures, prompt 0: the answer in the batch and"),
    "rows": (ANSWERS, {"answer": lambda a: a.roll(1, 0)}, "TowerFeatures, prompt 0: the answer in the batch and"),
    "nan": (ANSWERS, {"answer": lambda a: a * torch.nan}, "NaN or infinity in tokens.features"),
    "hook": ("nothing_stays_on_the_model", {"leave": True}, "after a run the model is not as it was: .*forward_hooks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(monkeypatch, name):
    test, mistake, told = MISTAKES[name]
    bind = TransformersAdapter.bind
    monkeypatch.setattr(TransformersAdapter, "bind", lambda model: Mistaken(bind(model), **mistake))
    kit = Family()
    kit.family = vlm_families.FAMILIES["llava"]
    kit.prepare()
    with pytest.raises((AssertionError, InputError, pytest.fail.Exception), match=told):
        getattr(kit, f"test_{test}")()


def test_rows_and_columns_mixed_up_are_found():
    kit = Family()
    kit.family = vlm_families.FAMILIES["qwen2_vl"]
    kit.prepare()
    rows, columns = (int(size) for size in kit._layout(kit.inputs([0])).grid[0].amax(0) + 1)
    assert rows != columns
    kit.sizes = lambda row: None if row else [(rows, columns)]
    kit.test_image_tokens_and_cells_fit_together()
    kit.sizes = lambda row: None if row else [(columns, rows)]
    with pytest.raises(AssertionError, match=rf"image 0: cells of .{rows}, {columns}. rows and columns, expected"):
        kit.test_image_tokens_and_cells_fit_together()
    kit.sizes = lambda row: [(rows, columns)] * 3
    with pytest.raises(AssertionError, match="prompt 0: 1 images found, expected 3"):
        kit.test_image_tokens_and_cells_fit_together()


def test_cells_of_another_order_can_be_allowed():
    numbers, cells = [0, 0, 0, 0], [(0, 0), (1, 0), (0, 1), (1, 1)]
    with pytest.raises(AssertionError, match="row by row"):
        check_cells("prompt 0", numbers, cells)
    check_cells("prompt 0", numbers, cells, [(2, 2)], in_reading_order=False)


def test_an_adapter_that_knows_everything_is_found(monkeypatch):
    bind = TransformersAdapter.bind
    monkeypatch.setattr(TransformersAdapter, "bind", lambda model: Mistaken(bind(kept)))
    kept = vlm_families.FAMILIES["llava"].build()
    kit = Family()
    kit.family = vlm_families.FAMILIES["llava"]
    kit.prepare()
    with pytest.raises(AssertionError, match=r"bind\(LlamaForCausalLM\) is to be None"):
        kit.test_it_knows_its_models_and_no_others()


def test_a_bind_that_raises_is_named(monkeypatch):
    def bind(model):
        return known(model) if model.config.vision_config else None

    known = TransformersAdapter.bind
    monkeypatch.setattr(TransformersAdapter, "bind", bind)
    kit = Family()
    kit.family = vlm_families.FAMILIES["llava"]
    kit.prepare()
    with pytest.raises(PluginError, match=r"adapter 'transformers' failed in bind\(\) with AttributeError"):
        kit.test_it_knows_its_models_and_no_others()


def test_what_the_author_has_to_give_is_told():
    class Bare(AdapterConformance):
        adapter = "transformers"

    with pytest.raises(pytest.UsageError, match=r"Bare: give model\(\)"):
        Bare().prepare()
