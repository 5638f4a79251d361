"""The photo model of tiny random parts: prompts, points, masks, pruning, and that the training tool reads the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from photo_parts import LAYERS, byte_tokenizer, random_delta, tiny_llama, tiny_photo_model, tiny_tower, tool_modules
from torch.nn import functional

import tokenprune as tp
from tokenprune.core.layout import SequenceLayout
from tokenprune.errors import CheckpointError, IncompatibleError, InputError, OptionError
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import random_script
from tokenprune_adapters.photos import adapter, model
from tokenprune_adapters.photos.parts import best_points, gather_cells, position_code
from tokenprune_adapters.photos.text import ChatTokenizer

CELLS = 24  # of a picture here
QUERIES = ["the person in a red dress", "a bag"]


@pytest.fixture(scope="module")
def small() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "CELLS", CELLS)
        yield tiny_photo_model()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoded(small: Any, picture: np.ndarray) -> Any:
    return small.encode_image(picture)


def test_a_picture_keeps_its_shape_in_about_as_many_cells(encoded: Any) -> None:
    assert encoded.tower.grid == (4, 6)
    assert encoded.image_embeddings.shape[1] == 24
    assert model.fitted(1000, 10) == (model.LONGEST, 1)


def test_masks_have_the_picture_s_size_and_come_from_the_points(small: Any, encoded: Any) -> None:
    found = small.segment(encoded, QUERIES)
    assert found.masks.shape == (2, 60, 90)
    assert found.text == ["[SEG]", "[SEG]"]
    states = small.answer(small.build_inputs(encoded, QUERIES)).states
    points = small.points(states, encoded.tower.grid)
    logits = small.head(encoded.tower.levels, points)[:, None]
    larger = functional.interpolate(logits, (128, 192), mode="bilinear", align_corners=False)
    wanted = functional.interpolate(larger, (60, 90), mode="bilinear", align_corners=False)[:, 0]
    inside = (slice(None), slice(0, 57), slice(0, 85))  # the last cells' blend with what is beyond the picture
    torch.testing.assert_close(found.mask_logits[inside], wanted[inside], atol=1e-4, rtol=1e-4)


def test_the_training_tool_reads_the_same_points(small: Any, picture: np.ndarray, encoded: Any) -> None:
    """Queries packed behind one picture with LoRA beside the weights, and rows of a batch with LoRA merged."""
    llama = tiny_llama()
    delta = random_delta(llama)
    with tool_modules("model", "evaluate") as (tool, evaluate):
        trained = tool.PhotoModel(llama, byte_tokenizer(), (2, LAYERS))
        trained.eval()
        for name, module in trained.named_modules():
            if isinstance(module, tool.LoraLinear):
                module.down = torch.nn.Parameter(delta[f"{name}.down"])
                module.up = torch.nn.Parameter(delta[f"{name}.up"])
        trained.projector.load_state_dict(_under(delta, "projector."))
        trained.taps[str(LAYERS)].read.load_state_dict(_under(delta, "mask_projection."))
        cells = gather_cells(encoded.tower.levels)
        with torch.no_grad():
            wanted = evaluate.answer_points(trained, cells, QUERIES, encoded.tower.grid, LAYERS)
    states = small.answer(small.build_inputs(encoded, QUERIES)).states
    points = small.points(states, encoded.tower.grid)
    assert (points[0] - points[1]).abs().max() > 1e-3
    torch.testing.assert_close(points, wanted, atol=1e-4, rtol=1e-4)


def test_what_the_tool_exports_is_what_the_adapter_takes() -> None:
    llama = tiny_llama()
    with tool_modules("model", "head", "export") as (tool, head, export):
        trained = tool.PhotoModel(llama, byte_tokenizer(), (2, LAYERS))
        written = export.delta(head.Eyes(tiny_tower()), trained, 2)
    assert not {name for name in written if ".layers.2." in name or ".layers.3." in name}
    decoder = tiny_llama()
    decoder.model.layers = decoder.model.layers[:2]
    small = adapter.assemble(decoder, tiny_tower(), ChatTokenizer(byte_tokenizer()), written, "two layers")
    assert len(small.decoder.model.layers) == 2


@pytest.mark.parametrize("name", ["uniform", "fastv", "divprune"])
def test_pruning_keeps_the_budget(small: Any, encoded: Any, name: str) -> None:
    found = small.segment(encoded, QUERIES, strategy=tp.strategy(name, budget=0.5))
    assert found.masks.shape == (2, 60, 90)
    assert found.trace.ledger.equivalent_tokens <= 12


@pytest.mark.parametrize("seed", range(4))
def test_pruned_equals_the_oracle(small: Any, encoded: Any, seed: int) -> None:
    """Dropping, parking and merging by chance, on queries of different lengths."""
    inputs = small.build_inputs(encoded, QUERIES)
    sequence = inputs.sequence
    layout = SequenceLayout.from_mask(sequence.image_tokens, sequence.attention_mask)
    script = random_script(layout.slots >= 0, LAYERS, small.decoder.config.hidden_size, seed)
    states, trace = small.run_decoder(inputs, script)
    positions = torch.arange(states.shape[1]).expand(states.shape[:2])
    with torch.no_grad():
        wanted = masked_full_length(small.decoder.model, sequence.inputs_embeds, layout, script, positions)
    assert trace.stages
    asked = sequence.mask_query
    torch.testing.assert_close(states[asked], wanted[asked], atol=2e-5, rtol=2e-5)


def test_keeping_all_is_the_same(small: Any, encoded: Any) -> None:
    plain = small.segment(encoded, QUERIES)
    kept = small.segment(encoded, QUERIES, strategy=tp.strategy("none"))
    assert torch.equal(plain.mask_logits, kept.mask_logits)


def test_a_strategy_that_reads_a_transformer_s_tower_is_refused(small: Any, encoded: Any) -> None:
    with pytest.raises(IncompatibleError, match="requires ReceivedAttention, TowerKeys"):
        small.segment(encoded, "a bag", strategy=tp.strategy("prumerge", budget=0.5))


def test_cells_of_pictures_of_different_shapes(small: Any, picture: np.ndarray) -> None:
    """Many pictures at once give what each gives alone, and every image token is told its cell."""
    tall = np.ascontiguousarray(picture.transpose(1, 0, 2))
    asked = [(picture, QUERIES), (tall, "a bag")]
    for many, (image, query) in zip(small.segment_many(asked), asked, strict=True):
        assert torch.equal(many.result.masks, small.segment(image, query).masks)
    inputs = small.build_inputs(tall, ["a bag"])
    masks = small.prompt_masks(inputs)
    cells = masks.grid[masks.image_tokens]
    wanted = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
    assert torch.equal(cells, wanted)


def test_generated_answers_and_control_tokens_are_refused(small: Any, encoded: Any) -> None:
    with pytest.raises(OptionError, match="trained on masks alone"):
        small.segment(encoded, "a bag", answer="generate")
    with pytest.raises(InputError, match="<empty_output>"):
        small.segment(encoded, "a <empty_output> bag")


def test_the_wordings_are_the_query(small: Any) -> None:
    assert small.wordings(small.prompts(["a bag"])) == {"question": [["a bag"]], "query": [["a bag"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda delta: delta.pop("head.leave.bias"), "missing head.leave.bias"),
        (lambda delta: delta.update(other=torch.zeros(1)), "unexpected other"),
        (lambda delta: delta.update({"head.leave.bias": torch.zeros(2)}), r"head.leave.bias has shape \[2\]"),
        (lambda delta: delta.pop("decoder.model.layers.0.mlp.up_proj.up"), "not both factors"),
        (
            lambda delta: delta.update({"decoder.model.layers.0.mlp.up_proj.up": torch.zeros(3, 4)}),
            r"up_proj.up has shape \[3, 4\]",
        ),
    ],
)
def test_other_tensors_are_refused(change: Any, message: str) -> None:
    llama = tiny_llama()
    delta = random_delta(llama)
    change(delta)
    with pytest.raises(CheckpointError, match=message):
        adapter.assemble(llama, tiny_tower(), ChatTokenizer(byte_tokenizer()), delta, "photo-tiny")


def test_points_are_means_around_the_likeliest_cell() -> None:
    logits = torch.full((1, 4 * 6), -20.0)
    logits[0, 1 * 6 + 2] = logits[0, 1 * 6 + 3] = 5.0
    logits[0, 3 * 6 + 5] = 4.9  # likely too, but elsewhere
    x, y = best_points(logits, 4, 6)[0].tolist()
    assert x == pytest.approx(3 / 6, abs=1e-3)
    assert y == pytest.approx(1.5 / 4, abs=1e-3)


def test_position_codes_tell_every_cell_apart() -> None:
    codes = position_code(10, 28)
    assert codes.shape == (280, 48)
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 0.3


def _under(delta: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in delta.items() if name.startswith(prefix)}
