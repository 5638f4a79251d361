"""Sa2VA's `segment`, its tiles, and strategies on it, with a tiny model of fixed weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sa2va_checkpoints import TILE, TILE_TOKENS, write_sa2va
from torch import Tensor

import tokenprune as tp
from tokenprune.core.reads import Crops, Pixels, Projector, Read, TowerStates
from tokenprune.errors import IncompatibleError, InputError
from tokenprune.evaluation.coverage import cells_to_pixels, places_at_end, token_map
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.evaluation.samples import run_single
from tokenprune.report.overlays import inspection_sheet
from tokenprune.testing.kit.model_snapshot import differences, snapshot
from tokenprune.testing.oracle import masked
from tokenprune.testing.scripted import random_script
from tokenprune_adapters.sa2va import Sa2vaModel
from tokenprune_adapters.sa2va.tiles import tile_grid

QUERIES = ["the cat", "the thing that is behind the red car", "Which of these can swim?"]
SHAPES = {"landscape": (45, 70), "portrait": (70, 30), "square": (16, 16), "thin": (3, 90)}
GRIDS = {"landscape": (3, 2), "portrait": (2, 5), "square": (1, 1), "thin": (12, 1)}
CHAT = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n{}"
REFUSED = {"visionzip", "prunesid", "cdpruner", "litelvlm"}
"""Strategies that read [CLS] as the projector would, or CLIP's space of texts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sa2va(tmp_path_factory.mktemp("sa2va") / "tiny-sa2va")


@pytest.fixture(scope="module")
def model(folder: Path) -> Sa2vaModel:
    loaded: Sa2vaModel = tp.load(folder)
    return loaded


def picture(shape: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (*SHAPES[shape], 3), dtype=np.uint8)


def states(model: Sa2vaModel, strategy: tp.Strategy | None = None, queries: list[str] = QUERIES) -> Tensor:
    with torch.inference_mode():
        return model.answer(model.build_inputs(picture("landscape"), queries), strategy).states


# tiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_aspect(model: Sa2vaModel, shape: str) -> None:
    height, width = SHAPES[shape]
    columns, rows = GRIDS[shape]
    encoded = model.encode_image(picture(shape))
    result = model.segment(encoded, QUERIES, strategy=tp.strategy("none"))
    assert (result.masks.shape, result.masks.dtype) == ((3, height, width), torch.bool)
    assert (result.low_res_logits.shape, result.query_index) == ((3, 16, 16), [0, 1, 2])
    assert torch.equal(result.masks, result.mask_logits > 0)
    assert (encoded.prepared.columns, encoded.prepared.rows) == (columns, rows)
    tiles = columns * rows + (columns * rows > 1)
    assert result.trace is not None
    assert result.trace.ledger.image_tokens == (tiles * TILE_TOKENS,) * 3


def test_tiles_are_cut_row_by_row(model: Sa2vaModel) -> None:
    """Against PIL alone: the picture stretched to 3 × 2 tiles, cropped one by one; then the whole picture."""
    image = Image.fromarray(picture("landscape"))
    stretched = image.resize((3 * TILE, 2 * TILE))
    crops = [
        stretched.crop((column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE))
        for row in range(2)
        for column in range(3)
    ]
    found = model.prepare_image(image)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = np.stack([(np.asarray(crop) / 255 - mean) / std for crop in (*crops, image.resize((TILE, TILE)))])
    assert torch.allclose(found.tiles.double(), torch.from_numpy(wanted).permute(0, 3, 1, 2), atol=1e-6)
    square = (np.asarray(image.resize((64, 64))) / 255 - mean) / std
    assert torch.allclose(found.sam_pixels[0].double(), torch.from_numpy(square).permute(2, 0, 1), atol=1e-6)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_the_nearest_grid_of_tiles(width: int, height: int, most: int) -> None:
    columns, rows = tile_grid(width, height, 448, most)
    distances = {(c, r): abs(width / height - c / r) for c in range(1, most + 1) for r in range(1, most // c + 1)}
    nearest = min(distances.values())
    assert distances[columns, rows] == nearest
    equal = [
        grid for grid, distance in distances.items() if distance == nearest and grid[0] / grid[1] == columns / rows
    ]
    filled = [grid for grid in equal if width * height > 0.5 * 448**2 * grid[0] * grid[1]]
    assert columns * rows == max([c * r for c, r in filled], default=min(c * r for c, r in equal))


def test_fewer_tiles(folder: Path) -> None:
    loaded = tp.load(folder, max_tiles=2)
    assert len(loaded.prepare_image(picture("thin")).tiles) == 3


def test_cells_of_the_trace(model: Sa2vaModel) -> None:
    """A bright spot in a cell of the picture is in the tile, and the quarter of it, of the token with that cell."""
    image = np.zeros((2 * TILE, 3 * TILE, 3), dtype=np.uint8)
    encoded = model.encode_image(image)
    result = model.segment(encoded, QUERIES[:2], strategy=tp.strategy("none"))
    assert result.trace is not None
    layout = result.trace.layout
    numbers, cells = layout.gather_slots(layout.image_number), layout.gather_slots(layout.grid)
    assert numbers[1].tolist() == [0] * 24 + [1] * 4
    assert cells[0, -4:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert sorted(map(tuple, cells[0, :24].tolist())) == [(row, column) for row in range(4) for column in range(6)]
    for row, column in ((0, 0), (1, 3), (2, 5), (3, 2)):
        spot = image.copy()
        spot[row * 8 : (row + 1) * 8, column * 8 : (column + 1) * 8] = 255
        pixels = model.prepare_image(spot).tiles - encoded.prepared.tiles
        place = (cells[0, :24] == torch.tensor([row, column])).all(1).nonzero().item()
        tile, inside = divmod(place, TILE_TOKENS)
        halves = pixels[tile].reshape(3, 2, 8, 2, 8).amax((0, 2, 4)).flatten()
        assert (pixels[:-1].amax((1, 2, 3)) > 1).nonzero().flatten().tolist() == [tile]
        assert (halves > 1).nonzero().flatten().tolist() == [inside]


def test_an_even_grid_crosses_tiles(model: Sa2vaModel) -> None:
    """Eight of 4 × 6 cells in six tiles, four in every other row; and one of the whole picture's four."""
    trace = model.segment(picture("landscape"), QUERIES[0], tp.strategy("uniform", keep=9)).trace
    assert trace is not None
    kept = trace.layout.gather_slots(trace.layout.grid)[0][trace.stages[0].active[0]].tolist()
    assert sorted(kept[:-1]) == [[row, column] for row in (1, 3) for column in (0, 2, 3, 5)]
    assert len(kept) == 9


def test_tokens_of_tiles_cover_the_picture(model: Sa2vaModel) -> None:
    height, width = SHAPES["landscape"]
    assert model.grid_box(height, width) == (0.0, 0.0, 45.0, 70.0)
    trace = model.segment(picture("landscape"), QUERIES[0], tp.strategy("none")).trace
    assert trace is not None
    kept = token_map(places_at_end(trace)[0].float(), trace, 0)
    assert kept.shape == (4, 6)
    assert cells_to_pixels(kept == 1, height, width, model.grid_box(height, width)).all()
    record = run_single(model, picture("landscape"), QUERIES[0], tp.strategy("prumerge+"))
    assert inspection_sheet(record).axes


# answers -------------------------------------------------------------------------------------------------------------


def test_prompts(model: Sa2vaModel) -> None:
    phrase, sentence = model.prompts([QUERIES[0], QUERIES[2]])
    assert phrase == CHAT.format(" Please segment the cat in this image.", "Sure, [SEG].")
    assert sentence == CHAT.format("Which of these can swim?", "Sure, [SEG].")
    assert model.prompts("Which?", answer="generate") == [CHAT.format("Which?", "")]
    assert model.segment(picture("square"), QUERIES[:2]).text == ["Sure, [SEG]."] * 2


@pytest.mark.parametrize("token", ["[SEG]", "<image>", "<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "</img>", "<p>"])
def test_queries_with_tokens_of_their_own_are_refused(model: Sa2vaModel, token: str) -> None:
    with pytest.raises(InputError, match="pass a complete prompt") as found:
        model.segment(picture("square"), f"the {token} cat")
    assert token in str(found.value)


def test_videos_are_refused(model: Sa2vaModel) -> None:
    with pytest.raises(
        InputError, match="2 images found, expected one: videos of Sa2VA are not supported; segment fra"
    ):
        model.segment([picture("square")] * 2, "the cat")
    with pytest.raises(InputError, match="expected"):
        model.segment(np.zeros((2, 8, 8, 3), np.uint8), "the cat")


def test_whole_prompts(model: Sa2vaModel) -> None:
    several = CHAT.format("What is there?", "A cat [SEG] and a dog [SEG].<|im_end|>")
    result = model.segment(picture("landscape"), prompt=[several, CHAT.format("The cat?", "[SEG]")])
    assert (result.query_index, result.text) == ([0, 0, 1], ["A cat [SEG] and a dog [SEG].", "[SEG]"])
    with pytest.raises(InputError, match=r"contains no \[SEG\]"):
        model.segment(picture("landscape"), prompt=CHAT.format("What?", "A cat."))
    with pytest.raises(InputError, match="contains <image> 2 times"):
        model.segment(picture("landscape"), prompt=CHAT.format("<image>", "[SEG]"))


@torch.inference_mode()
def test_masks_are_made_from_the_states_of_seg(model: Sa2vaModel) -> None:
    """By hand: transformers' decoder on the embeddings, the state of [SEG], the two layers, SAM 2's own forward."""
    encoded = model.encode_image(picture("landscape"))
    prompt = CHAT.format("What is there?", "A cat [SEG] and a dog [SEG].")
    before, after = prompt.split("<image>")
    marked = [model.tokenizer.encode(before + "<img>"), model.tokenizer.encode("</img>" + after)]
    table = model.decoder.get_input_embeddings()
    pieces = [table(torch.tensor(ids)) for ids in marked]
    embeds = torch.cat((pieces[0], encoded.image_embeddings[0], pieces[1]))[None]
    ids = [*marked[0], *[-1] * encoded.image_embeddings.shape[1], *marked[1]]
    places = [place for place, token in enumerate(ids) if token == model.seg_ids[0]]
    hidden = model.decoder.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, places]
    first, _, second = model.mask_projection
    spoken = second(torch.relu(first(hidden)))
    empty = model.sam.prompt_encoder.not_a_point_embed.weight
    sam = model.sam
    features = sam.get_image_embeddings(encoded.prepared.sam_pixels)
    for row, prompt_embedding in enumerate(spoken):
        candidates, quality, *_ = sam.mask_decoder(
            image_embeddings=features[-1],
            image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.cat((empty, empty, prompt_embedding[None]))[None, None],
            dense_prompt_embeddings=sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 4, 4),
            multimask_output=True,
            high_resolution_features=features[:-1],
        )
        result = model.segment(encoded, prompt=prompt)
        assert torch.allclose(result.low_res_logits[row], candidates[0, 0, quality[0, 0].argmax()], atol=1e-4)
    assert len(result.masks) == 2
    assert not torch.allclose(result.low_res_logits[0], result.low_res_logits[1], atol=1e-2)


def scripted(model: Sa2vaModel, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model say this text, one token a forward, whatever it would have said."""
    script: Iterator[int] = iter(model.tokenizer.encode(text))
    rows = model.decoder.lm_head.out_features

    def forward(state: Tensor) -> Tensor:
        logits = torch.zeros(*state.shape[:-1], rows)
        logits[..., next(script)] = 1
        return logits

    monkeypatch.setattr(model.decoder.lm_head, "forward", forward)


SAID = "A cat [SEG] and a dog [SEG]."


@pytest.mark.parametrize("strategy", [None, "none", "uniform", "prumerge+"])
def test_generated_masks_are_those_of_the_same_words_forced(
    model: Sa2vaModel, monkeypatch: pytest.MonkeyPatch, strategy: str | None
) -> None:
    pruning = None if strategy is None else tp.strategy(strategy)
    forced = model.segment(picture("landscape"), prompt=CHAT.format("What?", SAID), strategy=pruning)
    scripted(model, monkeypatch, SAID + "<|im_end|> more")
    said = model.segment(picture("landscape"), "What?", pruning, answer="generate", draft=False)
    assert (said.text, said.query_index) == (SAID, [0, 0])
    assert torch.allclose(said.low_res_logits, forced.low_res_logits, atol=1e-4)


def test_a_mask_token_at_the_limit_has_no_state(model: Sa2vaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(model.tokenizer.encode("A cat [SEG]"))
    for limit, masks in ((count, 0), (count + 1, 1)):
        scripted(model, monkeypatch, SAID)
        said = model.segment(picture("square"), "What?", answer="generate", draft=False, max_new_tokens=limit)
        assert len(said.masks) == masks


def test_an_answer_that_ends_with_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the tokenizer of a decoder that is no Phi-3, its end of a turn is five tokens or more."""
    loaded = tp.load(write_sa2va(tmp_path, config={"template": "phi3_chat"}))
    assert loaded.tokenizer.token_id("<|end|>") is None
    scripted(loaded, monkeypatch, "A cat [SEG].\n<|end|>\n<|user|> more")
    said = loaded.segment(picture("square"), "What?", answer="generate", draft=False)
    assert (said.text, len(said.masks)) == ("A cat [SEG].", 1)
    prompt = "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\n{}"
    assert loaded.prompts("What?", answer="generate") == [prompt.format("")]
    assert loaded.segment(picture("square"), prompt=prompt.format("[SEG] <|end|>")).text == "[SEG]"
    with pytest.raises(InputError, match=r"contains <\|end\|>"):
        loaded.segment(picture("square"), "the <|end|> cat")


def test_text_answers(model: Sa2vaModel) -> None:
    result = model.segment(picture("square"), "Which?", answer="generate", max_new_tokens=3)
    assert isinstance(result.text, str)
    assert (result.masks.shape, result.query_index) == ((0, 16, 16), [])


# strategies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(tp.strategies()))
def test_every_strategy_runs_or_says_why(model: Sa2vaModel, name: str) -> None:
    strategy = tp.strategy(name, **({"keep": 0.6} if name == "dart" else {}))
    if name in REFUSED:
        with pytest.raises(IncompatibleError, match="requires Cl"):
            model.segment(picture("landscape"), QUERIES, strategy)
        return
    plain = model.segment(picture("landscape"), QUERIES)
    together = model.segment(picture("landscape"), QUERIES, strategy)
    assert together.trace is not None
    assert torch.equal(plain.mask_logits, together.mask_logits) == (not together.trace.stages)
    for row, query in enumerate(QUERIES[:2]):
        alone = model.segment(picture("landscape"), query, strategy)
        assert torch.allclose(alone.mask_logits[0], together.mask_logits[row], atol=1e-4)


def test_keep_all_is_the_untouched_model_to_the_bit(model: Sa2vaModel) -> None:
    model.segment(picture("landscape"), QUERIES)
    before = snapshot(model)
    plain = states(model)
    for strategy in (tp.strategy("none"), tp.strategy("uniform", keep=1.0)):
        assert torch.equal(states(model, strategy), plain)
    said = [
        model.segment(picture("landscape"), QUERIES, strategy, answer="generate", max_new_tokens=8, draft=False)
        for strategy in (None, tp.strategy("none"))
    ]
    assert said[0].text == said[1].text
    assert torch.equal(said[0].low_res_logits, said[1].low_res_logits)
    assert differences(before, snapshot(model)) == []


@torch.inference_mode()
def test_random_pruning_equals_the_masked_oracle(model: Sa2vaModel) -> None:
    inputs = model.build_inputs(picture("landscape"), QUERIES)
    _, trace = model.run_decoder(inputs, tp.strategy("none"))
    assert trace is not None
    plain, _ = model.run_decoder(inputs)
    real, changed = inputs.sequence.attention_mask.bool(), False
    for seed in range(4):
        script = random_script(trace.exists, layers=4, width=32, seed=seed)
        pruned, _ = model.run_decoder(inputs, script)
        with masked(model.decoder.model, trace.layout, script):
            slow, _ = model.run_decoder(inputs)
        assert torch.allclose(pruned[real], slow[real], atol=1e-4)
        changed |= not torch.allclose(pruned[real], plain[real], atol=1e-2)
    assert changed


@torch.inference_mode()
def test_reads_of_the_tower(model: Sa2vaModel) -> None:
    """Against transformers' tower with eager attention, tile by tile, pooled two by two by hand."""
    encoded = model.encode_image(picture("landscape"))
    source = model.vision_source(encoded, rows=2)
    assert model.offers() == frozenset(source.answers)
    assert Pixels not in model.offers()
    model.tower.set_attn_implementation("eager")
    try:
        seen = model.tower(encoded.prepared.tiles, output_hidden_states=True, output_attentions=True)
    finally:
        model.tower.set_attn_implementation("sdpa")

    def pooled(values: Tensor) -> Tensor:
        """[7, 16, D] -> [28, D]: patches (0, 1, 4, 5), (2, 3, 6, 7), … of a tile of 4 × 4."""
        four = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        return torch.stack([values[:, patches].mean(1) for patches in four], 1).flatten(0, 1)

    def close(read: Read, wanted: Tensor) -> bool:
        found = source.provide(read)
        assert found.shape[:2] == (2, 28)
        return torch.allclose(found[0], wanted, atol=1e-5) and torch.equal(found[0], found[1])

    attention = seen.attentions[1].mean(1)
    assert close(tp.ClsAttention(1), pooled(attention[:, 0, 1:, None])[:, 0])
    assert close(tp.ReceivedAttention(-2), pooled(attention.mean(1)[:, 1:, None])[:, 0])
    assert close(TowerStates(2, 3), pooled((seen.hidden_states[2] + seen.hidden_states[3])[:, 1:] / 2))
    assert source.provide(Crops())[0].tolist() == [tile for tile in range(7) for _ in range(4)]
    layer = model.tower.encoder.layer[2]
    entered = layer.layernorm_before(seen.hidden_states[2])
    assert close(tp.TowerKeys(-1), pooled(layer.attention.k_proj(entered)[:, 1:]))
    assert close(tp.TowerValues(2), pooled(layer.attention.v_proj(entered)[:, 1:]))
    queries = layer.attention.q_proj(entered)[:, :1]
    assert close(tp.ClsQuery(2), queries.expand(-1, 4, -1).flatten(0, 1))
    features = source.provide(tp.TowerFeatures())
    assert torch.allclose(source.provide(Projector())(features)[1], encoded.image_embeddings[0], atol=1e-5)
    with pytest.raises(InputError, match="tower layer 3 was requested, but the vision tower has 3 layers"):
        source.provide(tp.TowerKeys(3))


def test_many_images(model: Sa2vaModel) -> None:
    pairs = [(picture(shape), query) for shape, query in zip(SHAPES, [*QUERIES, "a dog"], strict=True)]
    for strategy in (None, tp.strategy("prumerge+")):
        done = list(model.segment_many(pairs, strategy, batch_size=4, keep_logits=True, on_error="raise"))
        for (image, query), many in zip(pairs, done, strict=True):
            alone = model.segment(image, query, strategy)
            assert many.result is not None
            assert torch.allclose(many.result.mask_logits, alone.mask_logits, atol=1e-4)


def test_the_model_can_be_compared(model: Sa2vaModel) -> None:
    assert isinstance(model, SegmentationModel)
    result = tp.compare(model, "shapes", ["none", "uniform", "csp"], budget=0.5, limit=2, timing_samples=0)
    by_name = {row.strategy: row for row in result.rows}
    assert by_name["none"].agreement == pytest.approx(1.0)
    total = by_name["none"].equivalent_tokens
    assert by_name["uniform"].equivalent_tokens <= total / 2
    assert by_name["csp"].equivalent_tokens <= total / 2


def test_gradients_reach_the_weights(model: Sa2vaModel) -> None:
    inputs = model.build_inputs(picture("landscape"), QUERIES[:1])
    found, _ = model.run_decoder(inputs)
    low_res, _ = model.low_res_logits(found[inputs.sequence.mask_query], inputs.encoded)
    low_res.sum().backward()
    for part in (model.projector, model.mask_projection, model.sam.mask_decoder.transformer):
        assert all(parameter.grad is not None for parameter in part.parameters())
    model.zero_grad()
