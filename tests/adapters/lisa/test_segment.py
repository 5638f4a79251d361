"""LISA's `segment` and its steps, on a tiny model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lisa_checkpoints import IMAGE_TOKENS, write_lisa
from PIL import Image

import tokenprune as tp
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.errors import InputError, OptionError, UnsupportedError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune_adapters.lisa import LisaModel
from tokenprune_adapters.llava.prompt import IMAGE_ID, splice
from tokenprune_adapters.segmentation.queries import is_sentence
from tokenprune_adapters.segmentation.sam import masks as sam_masks

HEIGHT, WIDTH = 45, 70
QUERIES = ["the cat", "the thing that is behind the red car", "Which of these can swim?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LisaModel:
    loaded: LisaModel = tp.load(write_lisa(tmp_path_factory.mktemp("lisa")))
    return loaded


@pytest.fixture(scope="module")
def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_shapes_and_types(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    result = model.segment(image, QUERIES)
    assert (result.masks.shape, result.masks.dtype) == ((3, HEIGHT, WIDTH), torch.bool)
    assert (result.mask_logits.shape, result.mask_logits.dtype) == ((3, HEIGHT, WIDTH), torch.float32)
    assert result.low_res_logits.shape == (3, 32, 32)
    assert result.iou_predictions.shape == (3,)
    assert result.query_index == [0, 1, 2]
    assert torch.equal(result.masks, result.mask_logits > 0)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (None, {}),
        ("none", {}),
        ("blind", {}),
        ("uniform", {"budget": 0.6}),
        ("fastv", {"budget": 0.6}),
        ("prumerge", {}),
        ("prumerge+", {}),
        ("csp", {"budget": 0.6, "clustering": "random"}),
        ("csp", {"budget": 0.6, "clustering": "cls_attention", "query": "seg"}),
        ("csp", {"budget": 0.6, "clustering": "seg_first", "reentry": "delta"}),
        ("csp", {"budget": 0.6, "clustering": "kmeans"}),
    ],
)
def test_a_query_in_a_batch_equals_the_query_alone(
    model: LisaModel, image: np.ndarray[Any, Any], strategy: str | None, options: dict[str, Any]
) -> None:
    pruning = None if strategy is None else tp.strategy(strategy, **options)
    together = model.segment(image, QUERIES, strategy=pruning)
    for row, query in enumerate(QUERIES):
        alone = model.segment(image, query, strategy=pruning)
        assert torch.allclose(alone.mask_logits[0], together.mask_logits[row], atol=1e-4)
        assert alone.text == "[SEG]."


def test_all_kinds_of_images_give_the_same_mask(model: LisaModel, image: np.ndarray[Any, Any], tmp_path: Path) -> None:
    picture = Image.fromarray(image)
    picture.save(tmp_path / "image.png")
    tensor = torch.from_numpy(image)
    kinds: list[Any] = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        picture,
        picture.convert("RGBA"),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1).float() / 255,
        image.astype(np.float64) / 255,
        np.concatenate([image, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2),
    ]
    wanted = model.segment(image, "the cat").mask_logits
    for kind in kinds:
        assert torch.equal(model.segment(kind, "the cat").mask_logits, wanted)


def test_grey_images(model: LisaModel) -> None:
    grey = np.arange(600, dtype=np.uint8).reshape(20, 30)
    wanted = model.segment(np.stack([grey] * 3, axis=-1), "the cat").mask_logits
    for kind in (grey, grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert torch.equal(model.segment(kind, "the cat").mask_logits, wanted)


def test_a_photo_file_is_turned_upright(model: LisaModel, image: np.ndarray[Any, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by a quarter
    Image.fromarray(image).save(tmp_path / "photo.png", exif=exif)
    assert model.segment(tmp_path / "photo.png", "the cat").masks.shape == (1, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("nowhere.png", "no such file"),
        (b"bytes", "is a bytes, expected a path"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), bool), "booleans"),
        (np.full((4, 4, 3), 2.0), "expected 0…1"),
        (np.full((4, 4, 3), np.nan), "expected 0…1"),
        (np.full((4, 4, 3), -1), "expected 0…255"),
        (torch.zeros(2, 3, 4, 4), r"expected \[3, H, W\]"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image(model: LisaModel, bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.segment(bad, "the cat")


def test_files_that_are_no_images(model: LisaModel, image: np.ndarray[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(InputError, match="is not an image that PIL can read"):
        model.segment(tmp_path / "notes.png", "the cat")
    Image.fromarray(image).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.png' cannot be read"):
        model.segment(tmp_path / "cut.png", "the cat")
    with pytest.raises(InputError, match="is a folder, expected an image file"):
        model.segment(tmp_path, "the cat")


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"query": ""}, "query is empty"),
        ({"query": ["the cat", " \n"]}, "query is empty"),
        ({"query": []}, "query is an empty list"),
        ({"query": [3]}, "query is a int"),
        ({"query": 3}, "query is a int"),
        ({"query": "the [SEG]"}, r"contains \[SEG\]"),
        ({"query": "<image> of a cat"}, "contains <image>"),
        ({}, "neither of query and prompt"),
        ({"query": "the cat", "prompt": "<image> [SEG]"}, "both of query and prompt"),
        ({"prompt": "no picture [SEG]"}, "contains <image> 0 times, expected it once"),
        ({"prompt": "<image> and no mask"}, r"no \[SEG\]"),
        ({"query": ["a", "b"], "is_sentence": [True]}, "1 values for 2 queries"),
    ],
)
def test_bad_queries(model: LisaModel, image: np.ndarray[Any, Any], given_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.segment(image, **given_)


def test_bad_answer_options(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    with pytest.raises(OptionError, match="expected 'forced' or 'generate'"):
        model.segment(image, "the cat", answer="guess")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="max_new_tokens: 0 found"):
        model.segment(image, "the cat", answer="generate", max_new_tokens=0)


def test_templates(model: LisaModel) -> None:
    phrase, sentence = model.prompts([" the cat ", "What can swim?"])
    assert "\n What is the cat in this image? Please output segmentation mask. ASSISTANT: [SEG].</s>" in phrase
    assert "<im_end>\n What can swim? Please output segmentation mask. ASSISTANT: [SEG].</s>" in sentence
    assert model.prompts("the cat", is_sentence=True)[0].endswith(
        "\n the cat Please output segmentation mask. ASSISTANT: [SEG].</s>"
    )
    assert model.prompts("Where?", answer="generate")[0].endswith("<im_end>\nWhere? ASSISTANT:")
    assert "What is a dog in this" in model.prompts("a dog", answer="generate")[0]
    assert [is_sentence(text) for text in ("the cat", "It flies.", "What flies?", "no. 3")] == [
        False,
        True,
        True,
        False,
    ]


def test_the_towers_run_once(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    runs = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: runs.append(type(module).__name__))
        for module in (model.tower, model.sam.vision_encoder, model.decoder.model)
    ]
    encoded = model.encode_image(image)
    assert model.encode_image(encoded) is encoded
    result = model.segment(encoded, QUERIES, strategy=tp.strategy("prumerge+"))
    for hook in hooks:
        hook.remove()
    assert sorted(runs) == sorted(["CLIPVisionModel", "SamVisionEncoder", "LlamaModel"])
    assert torch.equal(result.masks, model.segment(image, QUERIES, strategy=tp.strategy("prumerge+")).masks)


def test_one_mask_for_each_seg_of_a_prompt(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    opening = "USER: <im_start><image><im_end> Show them. ASSISTANT:"
    both = model.segment(image, prompt=f"{opening} The cat [SEG] and the dog [SEG].</s>")
    assert both.masks.shape[0] == 2
    assert both.query_index == [0, 0]
    assert both.text == "The cat [SEG] and the dog [SEG]."
    first = model.segment(image, prompt=f"{opening} The cat [SEG]")
    assert torch.allclose(first.mask_logits[0], both.mask_logits[0], atol=1e-4)
    as_list = model.segment(
        image, prompt=[f"{opening} The cat [SEG]", f"{opening} The cat [SEG] and the dog [SEG].</s>"]
    )
    assert as_list.query_index == [0, 1, 1]
    assert torch.allclose(as_list.mask_logits[1:], both.mask_logits, atol=1e-4)


def test_generation_with_a_cache_equals_recomputation(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    with torch.inference_mode():
        encoded = model.encode_image(image)
        inputs = model.inputs_of(model.prompts(QUERIES, "generate"), encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=5)
        for row, prompt in enumerate(inputs.prompts):
            alone = model.inputs_of([prompt], encoded, continues=True).sequence.inputs_embeds
            said = model.decoder.get_input_embeddings()(torch.tensor([generated.ids[row]]))
            states = model.decoder.model(inputs_embeds=torch.cat([alone, said], dim=1)).last_hidden_state[0]
            steps = len(generated.ids[row])
            start = alone.shape[1] - 1
            assert torch.allclose(states[start : start + steps], generated.states[row, :steps], atol=1e-4)
            predicted = model.decoder.lm_head(states[start : start + steps]).argmax(-1)
            assert predicted.tolist() == generated.ids[row]


def test_generation_stops_at_the_end_token(
    model: LisaModel, image: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        inputs = model.inputs_of(model.prompts(QUERIES, "generate"), model.encode_image(image), continues=True)
        free, _ = model.run_generation(inputs, max_new_tokens=6)
        end = free.ids[0][2]
        monkeypatch.setattr(model.decoder.config, "eos_token_id", [end])
        stopped, _ = model.run_generation(inputs, max_new_tokens=6)
    for ids, all_ids in zip(stopped.ids, free.ids, strict=True):
        assert ids == all_ids[: all_ids.index(end) + 1 if end in all_ids else 6]


def test_generated_masks_come_from_the_state_that_said_seg(
    model: LisaModel, image: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        encoded = model.encode_image(image)
        inputs = model.inputs_of(model.prompts(QUERIES, "generate"), encoded, continues=True)
        generated, _ = model.run_generation(inputs, max_new_tokens=6)
        said = generated.ids[1][3]
        monkeypatch.setattr(LisaModel, "seg_ids", [said])
        result = model.segment(encoded, QUERIES, answer="generate", max_new_tokens=6)
        rows, steps = generated.where(said)
        wanted, _ = model.low_res_logits(generated.states[rows, steps], encoded)
    assert result.query_index == rows
    assert 1 in rows
    assert torch.allclose(result.low_res_logits, wanted, atol=1e-5)
    assert isinstance(result.text, list)
    assert len(result.text) == 3


def test_an_answer_without_seg_gives_no_mask(
    model: LisaModel, image: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LisaModel, "seg_ids", [10**6])
    result = model.segment(image, "the cat", answer="generate", max_new_tokens=2)
    assert result.masks.shape == (0, HEIGHT, WIDTH)
    assert result.low_res_logits.shape == (0, 32, 32)
    assert result.query_index == []


def test_strategies_leave_a_trace_and_nothing_else(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    plain = model.segment(image, QUERIES)
    pruned = model.segment(image, QUERIES, strategy=tp.strategy("uniform", budget=0.5))
    assert pruned.trace is not None
    assert pruned.trace.ledger.image_tokens == (IMAGE_TOKENS,) * 3
    assert pruned.trace.ledger.equivalent_tokens == IMAGE_TOKENS / 2
    assert not torch.equal(plain.mask_logits, pruned.mask_logits)
    assert torch.equal(plain.mask_logits, model.segment(image, QUERIES).mask_logits)
    hooked = [part for part in model.decoder.model.layers if part._forward_pre_hooks or part.self_attn._forward_hooks]
    assert hooked == []
    tower = getattr(model.tower, "vision_model", model.tower)  # nested in some releases of transformers
    assert {layer.self_attn.config._attn_implementation for layer in tower.encoder.layers} == {"sdpa"}


def test_generation_under_a_strategy(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    kept = model.segment(image, QUERIES, strategy=tp.strategy("none"), answer="generate", max_new_tokens=4)
    assert kept.text == model.segment(image, QUERIES, answer="generate", max_new_tokens=4).text
    pruned = model.segment(
        image, QUERIES, strategy=tp.strategy("fastv", budget=0.6), answer="generate", max_new_tokens=4
    )
    assert pruned.trace is not None
    assert pruned.trace.ledger.equivalent_tokens <= 0.6 * IMAGE_TOKENS
    for row, query in enumerate(QUERIES):
        alone = model.segment(
            image, query, strategy=tp.strategy("fastv", budget=0.6), answer="generate", max_new_tokens=4
        )
        assert alone.text == pruned.text[row]


def test_an_open_context_is_not_nested(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    inputs = model.build_inputs(image, QUERIES)
    with model.pruned(tp.strategy("none")), pytest.raises(UnsupportedError, match="do not nest"):
        model.run_decoder(inputs, tp.strategy("none"))


def test_gradients_flow_through_the_steps(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    inputs = model.build_inputs(image, ["the cat"])
    states, _ = model.run_decoder(inputs, tp.strategy("uniform", budget=0.5))
    low_res, _ = model.low_res_logits(states[inputs.sequence.mask_query], inputs.encoded)
    low_res.square().mean().backward()
    tower = getattr(model.tower, "vision_model", model.tower)
    parts = [tower.embeddings.patch_embedding, model.projector, model.decoder.model.layers[0].self_attn.q_proj]
    gradients = [part.weight.grad for part in [*parts, model.mask_projection[0], model.sam.vision_encoder.neck.conv1]]
    model.zero_grad(set_to_none=True)
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


class Noise(Dataset):
    """Two scenes of noise."""

    name = "noise"
    splits = ("val",)
    kinds = ("any",)

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        draw = np.random.default_rng(seed)
        for number in range(2):
            pixels = draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            mask = np.zeros((40, 60), dtype=bool)
            mask[10:30, 20:40] = True
            yield Scene(str(number), pixels, [Query(text, "any", mask) for text in QUERIES[:2]])


def test_the_model_can_be_compared(model: LisaModel) -> None:
    assert isinstance(model, SegmentationModel)
    result = tp.compare(model, Noise(), ["none", "uniform", "prumerge+"], budget=0.5, timing_samples=0)
    by_name = {row.strategy: row for row in result.rows}
    assert by_name["none"].agreement == pytest.approx(1.0)
    assert by_name["uniform"].equivalent_tokens == IMAGE_TOKENS / 2


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([32, 64]))
@settings(max_examples=40, deadline=None)
def test_sam_input(height: int, width: int, square: int) -> None:
    image = Image.fromarray(np.full((height, width, 3), 200, np.uint8))
    pixels, sizes = sam_masks.preprocess(image, square)
    assert pixels.shape == (1, 3, square, square)
    assert sizes.original == (height, width)
    assert max(sizes.resized) == square
    rows, columns = sizes.resized
    assert bool((pixels[..., :rows, :columns] != 0).all())
    assert not bool(pixels[..., rows:, :].any())
    assert not bool(pixels[..., columns:].any())
    logits = sam_masks.to_original_size(torch.full((2, 8, 8), 3.0), sizes)
    assert logits.shape == (2, height, width)
    assert torch.allclose(logits, torch.tensor(3.0))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(1, 7), max_size=5)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_spliced_prompts(prompts: list[tuple[int, list[int]]], continues: bool) -> None:
    embedding = torch.nn.Embedding(8, 3)
    image = torch.randn(1, 4, 3)
    rows = [[1] * (before + 1) + [IMAGE_ID, *after] for before, after in prompts]
    inputs = splice(rows, image, embedding, [7], continues)
    for row, ids in enumerate(rows):
        at = ids.index(IMAGE_ID)
        wanted = torch.cat(
            [embedding(torch.tensor(ids[:at])), image[0], embedding(torch.tensor(ids[at + 1 :], dtype=torch.long))]
        )
        valid = inputs.attention_mask[row].bool()
        assert torch.equal(inputs.inputs_embeds[row][valid], wanted)
        assert inputs.token_ids[row][inputs.image_tokens[row]].tolist() == [IMAGE_ID] * 4
        assert not bool((inputs.image_tokens[row] & ~valid).any())
        assert int(inputs.seg[row].sum()) == ids.count(7)
        assert bool(valid[-1 if continues else 0])
        if continues:
            assert inputs.mask_query[row].nonzero().flatten().tolist() == [len(valid) - 1]
        else:
            assert torch.equal(inputs.mask_query[row].nonzero() + 1, inputs.seg[row].nonzero())


def test_masks_made_within_a_context_tell_of_the_pruning(model: LisaModel, image: np.ndarray[Any, Any]) -> None:
    strategy = tp.strategy("uniform", keep=4)
    alone = model.segment(image, QUERIES[0], strategy)
    marked = model.build_inputs(image, QUERIES[:1]).sequence.image_tokens
    with tp.prune(model.decoder, strategy, image_tokens=marked) as run:
        within = model.segment(image, QUERIES[0])
        assert within.trace is run.trace
    assert torch.equal(within.mask_logits, alone.mask_logits)
    assert within.trace.stages[0].kept == alone.trace.stages[0].kept  # type: ignore[union-attr]
    assert model.segment(image, QUERIES[0]).trace is None


def test_a_loaded_model_is_two_lines(model: LisaModel) -> None:
    first, second = repr(model).splitlines()
    assert first.startswith(f"LisaModel {model.name!r}: a decoder of ")
    assert ".segment(image, query, strategy)" in second


def test_a_prompt_beyond_the_models_context_is_refused(
    model: LisaModel, image: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = model.build_inputs(image, QUERIES[:1]).sequence.token_ids.shape[1]
    monkeypatch.setattr(model.decoder.config, "max_position_embeddings", length)
    model.segment(image, QUERIES[0])
    for answer in ("forced", "generate"):
        with pytest.raises(InputError, match=rf"the prompt has \d+ positions, .*maximum is {length} .*shorten"):
            model.segment(image, QUERIES[0] + " cat" * 20, answer=answer)  # type: ignore[arg-type]
