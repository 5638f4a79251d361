"""Towers that come with their whole CLIP model: image tokens and texts in its space, and who is offered them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import glamm_checkpoints
import lisa_checkpoints
import numpy as np
import pixellm_checkpoints
import pytest
import torch
import transformers
from clip_checkpoints import CONTEXT, SPACE, whole_clip
from transformers import CLIPModel, CLIPTokenizerFast

import tokenprune as tp
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.reads import ClipImageEmbeddings, ClipTextEmbeddings, Read
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.errors import CheckpointError, IncompatibleError, InputError
from tokenprune_adapters.clip.shared_space import ClipSpace
from tokenprune_adapters.glamm.prompts import QUESTIONS
from tokenprune_adapters.llava.prompt import questions

WRITERS: dict[str, Callable[[Path], Path]] = {
    "lisa": lisa_checkpoints.write_lisa,
    "glamm": glamm_checkpoints.write_glamm,
    "pixellm": pixellm_checkpoints.write_pixellm,
}
QUERIES = ["the cat", "Which of these can fly?"]
ASKED = [
    "What is the cat in this image? Please output segmentation mask.",
    "Which of these can fly? Please output segmentation mask.",
]
IMAGE = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


class Reader(Strategy):
    """Keeps everything, and notes what it was given."""

    name = "reader"

    def __init__(self, *reads: Read) -> None:
        super().__init__()
        self.reads = reads
        self.seen: dict[Read, Any] = {}

    def stages(self, shape: Shape) -> list[Stage]:
        return [Stage("read", 0, reads=self.reads)]

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        self.seen = {read: tokens.read(read) for read in self.reads}
        return Keep.where(tokens.active)


class Loaded(dict[str, Any]):
    """Models by family; asking for one that the installed transformers cannot run skips the test."""

    def __getitem__(self, name: str) -> Any:
        if name == "pixellm" and int(transformers.__version__.split(".")[0]) < 5:
            pytest.skip(f"transformers {transformers.__version__}: its CLIP tower takes no attention_mask")
        return super().__getitem__(name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of every family, with a whole CLIP model as their tower."""
    root = tmp_path_factory.mktemp("models")
    for name, write in WRITERS.items():
        whole_clip(write(root / name) / "vision_tower")
    return {name: root / name for name in WRITERS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return Loaded({name: tp.load(folder) for name, folder in folders.items()})


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> tuple[CLIPModel, CLIPTokenizerFast]:
    folder = folders["lisa"] / "vision_tower"
    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizerFast.from_pretrained(folder)


def embedded(clip: tuple[CLIPModel, CLIPTokenizerFast], text: str) -> torch.Tensor:
    """transformers' own text embedding, [1, SPACE]."""
    model, tokenizer = clip
    inputs = tokenizer([text], truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        pooled = model.text_model(**inputs).pooler_output
        return model.text_projection(pooled)


def told(model: Any, read: Read, query: Any, **options: Any) -> Any:
    reader = Reader(read)
    model.segment(IMAGE, query, strategy=reader, **options)
    return reader.seen[read]


# texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lisa", "pixellm"])
@pytest.mark.parametrize(("wording", "texts"), [("query", QUERIES), ("question", ASKED)])
def test_every_row_has_its_own_text(
    name: str, wording: str, texts: list[str], models: dict[str, Any], clip: tuple[CLIPModel, CLIPTokenizerFast]
) -> None:
    values, exist = told(models[name], ClipTextEmbeddings(wording), QUERIES)
    assert values.shape == (2, 1, SPACE)
    assert exist.all()
    for row, text in enumerate(texts):
        torch.testing.assert_close(values[row], embedded(clip, text), atol=1e-5, rtol=1e-5)
    assert (values[0] - values[1]).abs().max() > 0.05


def test_turns_of_a_conversation_are_texts_of_one_row(
    models: dict[str, Any], clip: tuple[CLIPModel, CLIPTokenizerFast]
) -> None:
    glamm, three = models["glamm"], ["the cat", "a red car", "Which of these can fly?"]
    values, exist = told(glamm, ClipTextEmbeddings("query"), three)
    assert (values.shape, exist.tolist()) == ((1, 3, SPACE), [[True] * 3])
    for number, text in enumerate(three):
        torch.testing.assert_close(values[0, number : number + 1], embedded(clip, text), atol=1e-5, rtol=1e-5)
    values, _ = told(glamm, ClipTextEmbeddings("question"), three)
    asked = [question for question, _ in glamm.turns(three)]
    assert asked[0] in {text.format("the cat") for text in QUESTIONS}
    for number, text in enumerate(asked):
        torch.testing.assert_close(values[0, number : number + 1], embedded(clip, text), atol=1e-5, rtol=1e-5)


def test_rows_of_unlike_many_questions_are_padded(
    models: dict[str, Any], clip: tuple[CLIPModel, CLIPTokenizerFast]
) -> None:
    one = "USER: <image>\n Where is it? ASSISTANT: [SEG].</s>"
    two = f"{one}USER: And that? ASSISTANT: [SEG].</s>"
    for wording in ("query", "question"):
        values, exist = told(models["lisa"], ClipTextEmbeddings(wording), None, prompt=[one, two])
        assert exist.tolist() == [[True, False], [True, True]]
        assert not values[0, 1].any()
        torch.testing.assert_close(values[1, 1:], embedded(clip, "And that?"), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[0, :1], embedded(clip, "Where is it?"), atol=1e-5, rtol=1e-5)


def test_free_answers_and_prepared_inputs_know_their_texts(models: dict[str, Any]) -> None:
    lisa = models["lisa"]
    forced = told(lisa, ClipTextEmbeddings("query"), QUERIES)[0]
    free = told(lisa, ClipTextEmbeddings("query"), QUERIES, answer="generate", max_new_tokens=1)[0]
    assert torch.equal(forced, free)
    reader = Reader(ClipTextEmbeddings("query"))
    with torch.no_grad():
        lisa.run_decoder(lisa.build_inputs(IMAGE, QUERIES), reader)
    assert torch.equal(reader.seen[ClipTextEmbeddings("query")][0], forced)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("A chat. USER: <im_start><image><im_end>\n What is it? ASSISTANT: [SEG].</s>", ["What is it?"]),
        ("USER: <image>\nOne? ASSISTANT: [SEG].</s>USER: Two? ASSISTANT:", ["One?", "Two?"]),
        ("<image> no turns", ["no turns"]),
        ("USER: <image> open", ["open"]),
    ],
)
def test_questions_are_what_the_user_says(prompt: str, found: list[str]) -> None:
    assert questions(prompt) == found


def test_long_texts_are_truncated_or_cut_into_segments(folders: dict[str, Path]) -> None:
    space, device = ClipSpace(folders["lisa"] / "vision_tower"), torch.device("cpu")
    text = "a rather long question about something red, or green, in the picture"
    ids = space._tokenizer(text)["input_ids"]
    assert len(ids) > 2 * CONTEXT
    found, mask = space.cut_ids(text, "segments")
    assert found.shape == (-(-len(ids) // CONTEXT), CONTEXT)
    assert found[mask.bool()].tolist() == ids
    assert not found[~mask.bool()].any()
    assert space.embed_texts([text], "segments", device).shape == (len(found), SPACE)
    short, _ = space.cut_ids(text, "truncate")
    assert short[0].tolist() == [*ids[: CONTEXT - 1], ids[-1]]
    assert space.embed_texts([text, "b"], "truncate", device).shape == (2, SPACE)


# images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lisa", "glamm"])
def test_image_tokens_in_clip_space(name: str, models: dict[str, Any], folders: dict[str, Path]) -> None:
    model = models[name]
    found = told(model, ClipImageEmbeddings(), "the cat")
    whole = CLIPModel.from_pretrained(folders[name] / "vision_tower").eval()
    with torch.no_grad():
        pixels = model.prepare_image(IMAGE).clip_pixels
        states = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        wanted = whole.visual_projection(whole.vision_model.post_layernorm(states))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_pixellms_cells_are_means_of_their_visible_patches(models: dict[str, Any]) -> None:
    model = models["pixellm"]
    found = told(model, ClipImageEmbeddings(), QUERIES)
    with torch.no_grad():
        run = model.encode_image(IMAGE).tower
        patches = model.clip_space.embed_image(model.tower, run.patches.features)[0].unflatten(0, (32, 32))
    visible = run.visible.patches
    cells = [
        patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2][visible[2 * r : 2 * r + 2, 2 * c : 2 * c + 2]].mean(0)
        for r, c in run.visible.cells.nonzero().tolist()
    ]
    assert found.shape[0] == 2
    torch.testing.assert_close(found[1], torch.stack(cells), atol=1e-5, rtol=1e-5)


# who is offered it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["cdpruner", "litelvlm", "visionzip"])
@pytest.mark.parametrize("name", WRITERS)
def test_strategies_run_on_every_family(name: str, strategy: str, models: dict[str, Any]) -> None:
    model, chosen = models[name], tp.strategy(strategy, budget=0.25)
    assert tp.compatible(chosen, model).runs
    result = model.segment(IMAGE, QUERIES, strategy=chosen)
    assert result.trace is not None
    stage, total = result.trace.stages[0], result.trace.ledger.image_tokens
    assert [len(kept) for kept in stage.kept] == [int(0.25 * n + 1e-6) for n in total]
    assert len(result.masks) == 2


@pytest.mark.parametrize("strategy", ["cdpruner", "litelvlm"])
def test_rows_choose_by_their_own_text(strategy: str, models: dict[str, Any]) -> None:
    model, chosen = models["pixellm"], tp.strategy(strategy, keep=0.2, wording="query")

    def shown(query: Any) -> list[list[int]]:
        stage = model.segment(IMAGE, query, strategy=chosen).trace.stages[0]
        return [stage.origin[row, kept].tolist() for row, kept in enumerate(stage.kept)]

    both = shown(QUERIES)
    assert both == [*shown(QUERIES[0]), *shown(QUERIES[1])]
    assert both[0] != both[1]


def test_without_the_whole_model_it_is_refused_with_the_reason(tmp_path: Path) -> None:
    for model in (tp.load(lisa_checkpoints.write_lisa(tmp_path / "lisa")), tp.load("lisa-tiny")):
        assert model.clip_space is None
        for name in ("cdpruner", "litelvlm"):
            found = tp.compatible(name, model)
            assert found.missing == ("ClipImageEmbeddings", "ClipTextEmbeddings")
            assert "that needs a vision tower whose folder holds the whole CLIP model: text tower" in found.reason
            with pytest.raises(IncompatibleError, match="text tower"):
                model.segment(IMAGE, "the cat", strategy=tp.strategy(name))
        assert tp.compatible("visionzip", model).runs


@pytest.mark.parametrize("tokenizer", ["vocab.json", ""])
def test_a_tokenizer_belongs_to_it(tokenizer: str, tmp_path: Path) -> None:
    folder = whole_clip(lisa_checkpoints.write_tower(tmp_path), tokenizer=tokenizer)
    space = ClipSpace.find(folder)
    assert (space is None) == (tokenizer == "")
    if space is not None:
        assert space.embed_texts(["a cat"], "truncate", torch.device("cpu")).shape == (1, SPACE)


def test_nothing_is_read_before_a_strategy_asks(folders: dict[str, Path]) -> None:
    model = tp.load(folders["lisa"])
    model.segment(IMAGE, "the cat", strategy=tp.strategy("visionzip", budget=0.5))
    assert set(vars(model.clip_space)) == {"folder"}
    assert not any("text" in name and "embed" in name for name, _ in model.tower.named_modules())


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    folder = whole_clip(lisa_checkpoints.write_tower(tmp_path))
    (folder / "tokenizer.json").write_text("{")
    space = ClipSpace.find(folder)
    assert space is not None
    with pytest.raises(CheckpointError, match="CLIP's tokenizer cannot be loaded"):
        space.embed_texts(["a cat"], "truncate", torch.device("cpu"))


def test_texts_that_nobody_told_are_missed(models: dict[str, Any]) -> None:
    lisa = models["lisa"]
    source = lisa.vision_source(lisa.encode_image(IMAGE), 1)
    with pytest.raises(InputError, match="expected texts= to be passed"):
        source.provide(ClipTextEmbeddings())
    source = lisa.vision_source(lisa.encode_image(IMAGE), 1, {"query": [["a"]]})
    with pytest.raises(InputError, match=r"wording='question'.*expected one of query"):
        source.provide(ClipTextEmbeddings())
