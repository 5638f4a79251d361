"""What the training tool draws and keeps: cells of strips and of natural pictures, runs that resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photo_parts import LAYERS, byte_tokenizer, tiny_llama, tool_modules

from tokenprune.datasets.strips.photographs import HEIGHT, NAMES, WIDTH, View
from tokenprune.datasets.strips.queries import PersonQuery
from tokenprune.datasets.strips.strip import Strip


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    pytest.importorskip("pycocotools", reason="pycocotools, which reads COCO's masks, is not installed")
    names = ("scenes", "runs", "model", "losses")
    with tool_modules(*names) as modules:
        yield SimpleNamespace(**dict(zip(names, modules, strict=True)))


def test_masks_and_cells_of_a_strip(tool: Any) -> None:
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[20:300, 60:160] = 255
    labels[30:80, 80:130] = 1 + NAMES.index("dress")
    view = View(0, np.zeros((HEIGHT, WIDTH, 3), np.uint8), labels, {"dress": {"red": 0.9}})
    query = PersonQuery("a red dress", 0, ("dress",), "colour", False, False)
    scene = tool.scenes.of_strip(Strip([view, view], [query]))
    assert scene.asked[0].target.sum() == 280 * 100
    assert not scene.asked[0].target[:, WIDTH:].any()
    assert scene.asked[0].focus.sum() * 32**2 == pytest.approx(50 * 50)
    things, named = tool.losses.wanted_cells(scene)
    assert things.shape == (1, scene.grid[0] * scene.grid[1])
    assert (named & things).any()


def test_a_resumed_run_is_the_run_it_would_have_been(tool: Any, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, stop: int | None = None) -> torch.Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        trained = dict(layer.named_parameters())
        groups = [{"params": list(trained.values()), "lr": 0.0, "scale": 1.0}]
        phase = tool.runs.Phase(folder, "phase", trained, torch.optim.AdamW(groups))
        while phase.step < (stop or steps):
            rng = phase.begin_step(5)
            loss = layer(torch.from_numpy(rng.normal(size=(4, 3))).float() * torch.rand(4, 1)).square().mean()
            loss.backward()
            phase.end_step({"loss": float(loss.detach())}, 1e-2)
        phase.save()
        return layer.weight.detach().clone()

    whole = run(tmp_path / "whole", 6)
    before = run(tmp_path / "parts", 6, stop=3)
    assert not torch.equal(before, whole)
    assert torch.equal(run(tmp_path / "parts", 6), whole)


def test_packed_queries_do_not_see_each_other(tool: Any) -> None:
    model = tool.model.PhotoModel(tiny_llama(), byte_tokenizer(), (2, LAYERS)).eval()
    tokens = torch.randn(12, 32)
    kept = torch.tensor([0, 3, 4, 9])
    with torch.no_grad():
        together = model.read(tokens, ["a bag", "the one in a hat"], [2, LAYERS], kept)
        alone = model.read(tokens, ["the one in a hat"], [LAYERS], kept)
    torch.testing.assert_close(together[LAYERS][0][1], alone[LAYERS][0][0], atol=1e-5, rtol=1e-5)
    assert together[2][1].shape == (4, 32)


def test_a_pointer_teaches_and_a_blind_model_sees_nothing(tool: Any) -> None:
    model = tool.model.PhotoModel(tiny_llama(), byte_tokenizer(), (LAYERS,), blind=True).eval()
    cells = torch.randn(1, 952, 2, 3)
    assert torch.equal(model.image_tokens(cells), model.image_tokens(2 * cells))
    model.blind = False
    assert not torch.equal(model.image_tokens(cells), model.image_tokens(2 * cells))


def test_figures_of_an_evaluation(tool: Any) -> None:
    with tool_modules("evaluate") as (evaluate,):
        tally = evaluate.Tally()
        target = np.zeros((4, 8), dtype=bool)
        target[:, :4] = True
        one = tool.scenes.Asked("a bag", target, np.zeros((1, 1)), "garment", False)
        half = torch.from_numpy(target.copy())
        half[:2] = False
        tally.add(
            torch.stack([half, torch.zeros(4, 8, dtype=torch.bool)]), torch.tensor([[0.1, 0.9], [0.9, 0.1]]), [one, one]
        )
    assert tally.summary(kinds=True) == {
        "giou": 0.25,
        "ciou": 8 / 32,
        "hits": 0.5,
        "n": 2,
        "garment": [0.25, 2],
        "seen": [0.25, 2],
    }
