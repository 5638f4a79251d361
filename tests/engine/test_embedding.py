"""`tokenprune.embed`: what a runtime gets that takes embeddings, and what it answers with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_state import state
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import IncompatibleError, InputError, OptionError, UnsupportedError
from tokenprune.testing.tiny_decoders import tiny_llama

pytestmark = pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
QUESTION = "What is it?"
RENUMBERED: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("uniform", {"budget": 0.5, "positions": "renumber"}),
    ("divprune", {"budget": 0.25, "positions": "renumber"}),
    ("prumerge+", {"budget": 0.5, "positions": "renumber"}),
    ("visionzip", {"budget": 0.5, "positions": "renumber"}),
]


def load(name: str, root: Path) -> Any:
    return tp.load(write_vlm(root / name, name))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("llava", tmp_path_factory.mktemp("vlm"))


def answered(model: Any, embeds: torch.Tensor, question: str, limit: int) -> str:
    """What a runtime answers that replaces the image's placeholders by as many as there are embeddings, in a row."""
    ids = model.inputs(PICTURE, question)["input_ids"][0]
    places = (ids == model.model.config.image_token_id).nonzero().flatten()
    words = model.model.get_input_embeddings()(ids)
    whole = torch.cat((words[: places[0]], embeds, words[places[-1] + 1 :]))[None]
    mask = torch.ones(whole.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        said = model.model.generate(inputs_embeds=whole, attention_mask=mask, max_new_tokens=limit, do_sample=False)
    return str(model.processor.decode(said[0], skip_special_tokens=True))


@pytest.mark.parametrize(("name", "options"), RENUMBERED, ids=[name for name, _ in RENUMBERED])
def test_the_answer_with_them_is_that_of_the_renumbered_strategy(llava: Any, name: str, options: Any) -> None:
    strategy = tp.strategy(name, **options)
    said = llava.answer(PICTURE, QUESTION, strategy, max_new_tokens=8)
    found = tp.embed(llava, PICTURE, strategy, QUESTION)
    assert answered(llava, found, QUESTION, 8) == said.text
    assert len(found) == said.trace.ledger.entries[0].image[0]


def test_answers_depend_on_them(llava: Any) -> None:
    """Otherwise the test above would show nothing."""
    said = {
        answered(llava, tp.embed(llava, PICTURE, tp.strategy(name, **options), QUESTION), QUESTION, 8)
        for name, options in RENUMBERED
    }
    assert len(said) > 2


def test_they_have_the_shape_that_vllm_documents(llava: Any) -> None:
    """(1, tokens, width of the decoder) for an image, once the axis of images is added."""
    found = tp.embed(llava, PICTURE, tp.strategy("divprune", budget=0.25), QUESTION)
    config = llava.model.config
    assert found[None].shape == (1, 4, config.text_config.hidden_size)
    assert (found.dtype, found.device) == (llava.model.dtype, llava.model.device)
    assert found.is_contiguous()
    assert not found.requires_grad
    whole = tp.embed(llava, PICTURE, tp.strategy("none"), QUESTION)
    assert len(whole) == config.image_seq_length
    assert all((whole == row).all(1).any() for row in found)  # nothing was merged


def test_compositions_and_merged_tokens(llava: Any) -> None:
    both = tp.embed(llava, PICTURE, tp.strategy("uniform+divprune", budgets="0.5/0.5"), QUESTION)
    assert len(both) == 4
    whole = tp.embed(llava, PICTURE, tp.strategy("none"), QUESTION)
    merged = tp.embed(llava, PICTURE, tp.strategy("visionzip", budget=0.5), QUESTION)
    assert not all((whole == row).all(1).any() for row in merged)


@pytest.mark.parametrize(
    "name", ["llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "paligemma", "gemma3"]
)
def test_other_families(name: str, tmp_path: Path) -> None:
    model = load(name, tmp_path)
    whole = tp.embed(model, PICTURE, tp.strategy("none"), QUESTION)
    kept = tp.embed(model, PICTURE, tp.strategy("uniform", keep=0.5), QUESTION)
    assert whole.shape[1] == kept.shape[1] == model.model.config.get_text_config().hidden_size
    assert len(kept) == len(whole) // 2
    assert all((whole == row).all(1).any() for row in kept)


def test_no_layer_runs_and_nothing_stays(llava: Any) -> None:
    ran: list[Any] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *given: ran.append(1))
        for layer in llava.model.model.language_model.layers
    ]
    before = state(llava.model)
    tp.embed(llava, PICTURE, tp.strategy("divprune", budget=0.5), QUESTION)
    assert ran == []
    assert state(llava.model) == before
    llava.answer(PICTURE, QUESTION, max_new_tokens=1)
    assert len(ran) == len(hooks)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["fastv", "csp", "pyramiddrop", "sparsevlm", "uniform+fastv"])
def test_what_prunes_inside_the_decoder_is_refused_by_name(llava: Any, name: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        tp.embed(llava, PICTURE, tp.strategy(name), QUESTION)
    assert f"strategy {name!r} prunes inside the decoder" in str(caught.value)
    assert "at layer" in str(caught.value)


def test_what_embeddings_cannot_carry(llava: Any, tmp_path: Path) -> None:
    keeping = tp.strategy("divprune", positions="keep")
    for strategy in (keeping, tp.Sequence("uniform", keeping)):
        with pytest.raises(OptionError, match="positions='keep' has no effect"):
            tp.embed(llava, PICTURE, strategy, QUESTION)
    with pytest.raises(UnsupportedError, match="'qwen2_vl' computes positions from an image's grid"):
        tp.embed(load("qwen2_vl", tmp_path), PICTURE, tp.strategy("uniform"), QUESTION)
    with pytest.raises(UnsupportedError, match="'granite4_vision' adds visual features between the layers"):
        tp.embed(load("granite4_vision", tmp_path), PICTURE, tp.strategy("uniform"), QUESTION)
    with pytest.raises(IncompatibleError, match="cdpruner"):
        tp.embed(llava, PICTURE, tp.strategy("cdpruner"), QUESTION)


def test_a_decoder_that_changes_embeddings_first_is_refused(llava: Any) -> None:
    first = llava.model.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(lambda layer, given: (given[0] * 2, *given[1:]))
    with pytest.raises(UnsupportedError, match="'llava' changes embeddings before the first layer"):
        tp.embed(llava, PICTURE, tp.strategy("uniform"), QUESTION)
    hook.remove()


def test_wrong_arguments(llava: Any) -> None:
    uniform: Any = tp.strategy("uniform")
    for model in (tp.load("lisa-tiny"), tiny_llama(layers=2), "llava"):
        with pytest.raises(InputError, match="expected a vision-language model"):
            tp.embed(model, PICTURE, uniform, QUESTION)
    with pytest.raises(InputError, match="2 images in a list"):
        tp.embed(llava, [PICTURE, PICTURE], uniform, QUESTION)
    question: Any = [QUESTION, QUESTION]
    with pytest.raises(InputError, match="expected one text"):
        tp.embed(llava, PICTURE, uniform, question)
    with pytest.raises(InputError, match="prompt"):
        tp.embed(llava, PICTURE, uniform, " ")
    with pytest.raises(InputError, match="no such file"):
        tp.embed(llava, "nowhere.png", uniform, QUESTION)
    name: Any = "uniform"
    with pytest.raises(OptionError, match="strategy"):
        tp.embed(llava, PICTURE, name, QUESTION)
