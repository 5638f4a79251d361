"""The adapter `mistral3`: it knows its models and no others, marks their image tokens, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mistral3 import inputs, tiny_model
from tokenprune_mistral3.adapter import MODEL_TYPE, Mistral3Adapter

import tokenprune as tp
from tokenprune import Keep, Stage, Strategy, TowerFeatures
from tokenprune.testing.models import tiny_llama


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    with torch.inference_mode():
        model(**inputs([(2, 2)]))  # at its first call, transformers puts hooks of its own on a model
    return model


def hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


class Look(Strategy):
    """Keeps three tokens of the largest features, and what it was shown (copies)."""

    name = "look"

    def stages(self, shape):
        yield Stage("look", 0, min(3, shape.image_tokens), TowerFeatures())

    def choose(self, stage, tokens):
        type(self).seen = {name: getattr(tokens, name).clone() for name in ("features", "grid", "image", "active")}
        return Keep.top(tokens.features.norm(dim=-1).masked_fill(~tokens.active, -torch.inf), tokens.target)


def test_it_is_installed() -> None:
    assert tp.adapters()["mistral3"].distribution == "tokenprune-mistral3"


def test_it_knows_its_own_models_only(model: Any) -> None:
    assert Mistral3Adapter.matches("folder", {"model_type": MODEL_TYPE})
    assert not Mistral3Adapter.matches("folder", {"model_type": "another"})
    assert Mistral3Adapter.bind(model) is not None
    assert Mistral3Adapter.bind(model.model) is not None
    assert Mistral3Adapter.bind(tiny_llama()) is None
    assert Mistral3Adapter.bind("no model at all") is None


@torch.inference_mode()
def test_image_tokens_are_pruned_and_nothing_stays(model: Any) -> None:
    before = hooks(model)
    with tp.prune(model, tp.strategy("uniform", keep=4)) as run:
        model(**inputs([(2, 3), (4, 2)]))
    assert run.trace.ledger.image_tokens == (14,)
    assert run.trace.ledger.equivalent_tokens == 4
    assert hooks(model) == before


@torch.inference_mode()
def test_strategies_see_images_not_lines(model: Any) -> None:
    """[IMG_BREAK] stands between the lines of an image, which is one image all the same."""
    with tp.prune(model, Look()):
        model(**inputs([(2, 3)], [(1, 2), (2, 1)]))
    assert Look.seen["image"].tolist() == [[0] * 6, [0, 0, 1, 1, -1, -1]]
    assert Look.seen["grid"][0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert Look.seen["grid"][1, :4].tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]]


@torch.inference_mode()
def test_features_are_those_of_the_tokens_patches(model: Any) -> None:
    given = inputs([(2, 3)])
    states = model.model.vision_tower(given["pixel_values"], image_sizes=given["image_sizes"]).last_hidden_state[0]
    patches = states.view(4, 6, -1)
    with tp.prune(model, Look()):
        model(**given)
    features = Look.seen["features"][0]
    for token, (row, column) in enumerate(Look.seen["grid"][0].tolist()):
        expected = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1).mean(0)
        torch.testing.assert_close(features[token], expected)


@torch.inference_mode()
def test_keeping_all_is_the_untouched_model(model: Any) -> None:
    given = inputs([(2, 3)])
    expected = model(**given).logits
    with tp.prune(model, tp.strategy("uniform", keep=1.0)):
        torch.testing.assert_close(model(**given).logits, expected)
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("strategy", ["fastv", "uniform", "look"])
def test_padded_rows_answer_as_they_do_alone(model: Any, strategy: str) -> None:
    pruning = Look() if strategy == "look" else tp.strategy(strategy, keep=4)
    both = inputs([(2, 3)], [(2, 2)])
    with tp.prune(model, pruning):
        together = model(**both).logits[:, -1]
    for row, size in enumerate(both["image_sizes"].tolist()):
        real = both["attention_mask"][row].bool()
        height, width = size
        alone = {
            "input_ids": both["input_ids"][row, real][None],
            "attention_mask": both["attention_mask"][row, real][None],
            "pixel_values": both["pixel_values"][row : row + 1, :, :height, :width],
            "image_sizes": both["image_sizes"][row : row + 1],
        }
        with tp.prune(model, pruning):
            torch.testing.assert_close(model(**alone).logits[0, -1], together[row], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_it_generates(model: Any) -> None:
    given = inputs([(2, 3)], [(3, 2)])
    with tp.prune(model, Look()) as run:
        answer = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (2, given["input_ids"].shape[1] + 3)
    assert run.trace.ledger.equivalent_tokens == 3


@torch.inference_mode()
def test_a_prompt_without_images_runs(model: Any) -> None:
    text = inputs([])
    expected = model(**text).logits
    with tp.prune(model, tp.strategy("uniform", keep=4)):
        model(**inputs([(2, 3)]))
        torch.testing.assert_close(model(**text).logits, expected)


@torch.inference_mode()
def test_wrong_calls_are_told(model: Any) -> None:
    given = inputs([(2, 3)])
    embeddings = model.get_input_embeddings()(given["input_ids"])
    uniform = tp.strategy("uniform", keep=4)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="without input_ids"):
        model(inputs_embeds=embeddings)
    with tp.prune(model, uniform), pytest.raises(tp.TokenPruneError, match="6 image tokens, but its images give 0"):
        model(input_ids=given["input_ids"])


@torch.inference_mode()
def test_checkpoints_are_loaded(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    given = inputs([(2, 3)])
    loaded = tp.load(tmp_path)
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits)
    with pytest.raises(tp.TokenPruneError, match="no load option 'colour'"):
        tp.load(tmp_path, colour="red")
