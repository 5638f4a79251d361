"""The script behind the page on attention: against transformers, scikit-learn and scipy, and what is stored."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from photo_parts import LAYERS, tiny_photo_model
from scipy.stats import entropy, spearmanr
from sklearn.metrics import roc_auc_score

from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.errors import InputError
from tokenprune_adapters.photos import model

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLUMNS, HEADS = 4, 6, 2
TARGET = (slice(0, 30), slice(15, 60))  # of 60 x 90 pixels: the cells of rows 0 and 1 and of columns 1 to 3


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "figures"))
        yield importlib.import_module("attention")


@pytest.fixture(scope="module")
def small() -> Iterator[Any]:
    """A grid that is not square, and heads that share a key head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "CELLS", ROWS * COLUMNS)
        yield tiny_photo_model()


class Pictures(Dataset):
    """Two pictures of noise, each with two queries of different targets."""

    name, splits, kinds = "noise", ("val",), ("any",)

    def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
        for number in range(2):
            image = np.random.default_rng(number).integers(0, 255, (60, 90, 3), dtype=np.uint8)
            first, second = np.zeros((2, 60, 90), bool)
            first[TARGET], second[45:, 75:] = True, True
            yield Scene(f"noise-{number}", image, [Query("a hat", "any", first), Query("the red bag", "any", second)])


def scene() -> Scene:
    return next(Pictures().scenes("val"))


def test_rows_are_those_of_transformers_output_attentions(script: Any, small: Any) -> None:
    encoded, query = small.encode_image(scene().image), scene().queries[1]
    one = script.query_attention(small, encoded, query, small.grid_box(60, 90))

    sequence = small.build_inputs(encoded, [query.text]).sequence
    small.decoder.set_attn_implementation("eager")
    try:
        out = small.decoder.model(inputs_embeds=sequence.inputs_embeds, output_attentions=True, use_cache=False)
    finally:
        small.decoder.set_attn_implementation("sdpa")
    whole = torch.stack(out.attentions)[:, 0]  # [L, heads, S, S]
    assert whole.shape[:2] == (LAYERS, HEADS)
    image = sequence.image_tokens[0].nonzero().flatten()
    (row,) = sequence.mask_query[0].nonzero().flatten().tolist()
    wanted = {"mask_query": whole[:, :, row], "last": whole[:, :, -1], "text": whole[:, :, image[-1] + 1 :].mean(2)}
    for name, weights in wanted.items():
        np.testing.assert_allclose(one.weights[name], weights, atol=1e-5, err_msg=name)
    assert one.image.tolist() == image.tolist()

    shares = script.shares(one.weights["mask_query"].mean(1), one.image)
    by_hand = wanted["mask_query"].mean(1)
    np.testing.assert_allclose(shares["image"], by_hand[:, image].sum(1), atol=1e-6)
    np.testing.assert_allclose(shares["before"], by_hand[:, 1 : image[0]].sum(1), atol=1e-6)
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)


def test_the_target_s_cells_are_those_that_it_covers(script: Any, small: Any) -> None:
    encoded, box = small.encode_image(scene().image), small.grid_box(60, 90)

    def cells(target: np.ndarray) -> list[int]:
        one = script.query_attention(small, encoded, Query("a hat", "any", target), box)
        assert one.grid == (ROWS, COLUMNS)
        return sorted(one.cells[one.target].tolist())

    assert cells(scene().queries[0].mask) == [1, 2, 3, 7, 8, 9]
    little = np.zeros((60, 90), bool)
    assert cells(little) == []
    little[31:34, 50:57] = True  # less than half of any cell
    assert cells(little) == [15]


@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_those_of_sklearn_and_scipy(script: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(40, 0.3), 5)
    scores[1] = (scores[1] > 0.02) / 100  # ties
    target = rng.random(40) < 0.2
    found = script.spread(scores, target)
    for layer, row in enumerate(scores):
        assert found["auc"][layer] == pytest.approx(roc_auc_score(target, row))
        assert found["recency"][layer] == pytest.approx(spearmanr(row, np.arange(40)).statistic)
        assert found["entropy"][layer] == pytest.approx(entropy(row) / np.log(40), abs=1e-9)
        assert found["target"][layer] == pytest.approx(row[target].sum() / row.sum() / target.mean())
        assert found["top_tenth"][layer] == pytest.approx(sorted(row / row.sum())[-4:] @ np.ones(4))
        assert found["last_quarter"][layer] == pytest.approx(row[30:].sum() / row.sum())


def test_controls_use_maps_of_other_queries_alone(script: Any) -> None:
    """Three queries about a picture, two of which share a target, and one about another picture."""
    maps = np.eye(4)[:, None]  # [Q, L = 1, N]: all attention of query n on token n
    targets = np.eye(4, dtype=bool)[[0, 1, 1, 3]]
    found = script.controls(maps, targets, np.array([0, 0, 0, 1]))
    values, scenes = found["auc_other_queries"]
    assert scenes.tolist() == [0, 0, 0]
    # 0 is asked of the mean of 1 and 2, where token 0 ties with 3; 1 and 2 of the map of 0
    assert values[:, 0].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 3])
    values, scenes = found["auc_other_scenes"]
    assert scenes.tolist() == [0, 0, 0, 1]
    assert values[:, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_a_model_is_measured_and_stored(script: Any, small: Any, tmp_path: Path) -> None:
    found = script.measure(small, Pictures(), queries=4, example=1)
    script.store(found, tmp_path / "attention-tiny.json")
    read = json.loads((tmp_path / "attention-tiny.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(found))
    assert (read["queries"], read["scenes"], read["layers"], read["heads"]) == (4, 2, LAYERS, HEADS)
    assert read["example"]["query"] == "the red bag"
    assert read["example"]["target"] == [ROWS * COLUMNS - 1]
    for measures in read["rows"].values():
        assert measures["best_head"] == np.argmax(measures["auc_heads"], -1).tolist()
        for layer in range(LAYERS):
            assert sum(measures[name][layer][0] for name in script.PARTS) == pytest.approx(1, abs=0.003)
            assert all(low <= value <= high for value, low, high in [measures["auc"][layer]])


def test_queries_without_a_target_are_refused(script: Any, small: Any) -> None:
    class Empty(Pictures):
        def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
            yield Scene("empty", scene().image, [Query("nothing", "any", np.zeros((60, 90), bool))])

    with pytest.raises(InputError, match="noise, split 'val': no query has a target"):
        script.measure(small, Empty(), queries=1)


def test_the_figures_show_what_is_stored(script: Any, tmp_path: Path) -> None:
    script.draw(folder=tmp_path)
    for name in ("attention.svg", "attention-maps.svg"):
        drawn, stored = (
            next(node.text for node in ElementTree.parse(folder / name).iter() if node.tag.endswith("}description"))
            for folder in (tmp_path, ROOT / "docs" / "images")
        )
        assert drawn == stored, f"{name} shows other numbers; run tools/figures/attention.py draw"
        assert set(json.loads(drawn or "")) == set(script.SHOWN)


def test_the_page_says_what_is_stored(script: Any) -> None:
    page = " ".join((ROOT / "docs" / "attention.md").read_text(encoding="utf-8").split())
    found = script.read("attention-lisa-tiny")

    def means(row: str, measure: str) -> list[float]:
        return [value for value, _, _ in found["rows"][row][measure]]

    def span(measure: str, digits: int = 2, row: str = "mask_query") -> str:
        values = means(row, measure)
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    auc, others = means("mask_query", "auc"), means("mask_query", "auc_other_queries")
    last = span("target", 1, "last")
    for said in (
        f"{found['queries']} queries about {found['scenes']} scenes",
        f"{found['image_tokens'][0]} image tokens, {found['target_tokens']:.0f} of them on the target",
        f"The first token gets at most {max(means('mask_query', 'first')):.3f}.",
        f"The last quarter of the image gets {span('last_quarter')} of the image's attention",
        f"on the target it is {span('target', 0)} times an even share, of the last token {last} times",
        f"AUC of the mask query is {span('auc')},",
        f"finds the target with an AUC of {span('auc_other_scenes')}, where",
        f"fall from {others[0]:.2f} in layer 0 to {others[11]:.2f} in layer 11",
        f"AUC is {auc[0]:.2f} in layer 0, {auc[1]:.2f} in layer 1 and {auc[2]:.2f} in layer 2.",
        f"with an AUC of {means('last', 'auc')[2]:.2f} in layer 2, and maps of other queries do so with "
        f"{means('last', 'auc_other_queries')[2]:.2f}",
    ):
        assert said in page
