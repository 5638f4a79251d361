"""What the training tool draws and keeps: queries true for one person, splits that a seed fixes, runs that resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photo_parts import LAYERS, byte_tokenizer, tiny_llama, tool_modules
from PIL import Image

PERSONS = 4


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    pytest.importorskip("pycocotools", reason="pycocotools, which reads COCO's masks, is not installed")
    names = ("photographs", "queries", "scenes", "runs", "model", "losses")
    with tool_modules(*names) as modules:
        yield SimpleNamespace(**dict(zip(names, modules, strict=True)))


def person(tool: Any, number: int, *garments: tuple[str, str, int]) -> Any:
    """A view with squares of garments: (name, colour, pixels a side)."""
    height, width = tool.photographs.HEIGHT, tool.photographs.WIDTH
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[20:300, 60:160] = 255
    for place, (name, _, side) in enumerate(garments):
        top = 30 + 60 * place
        labels[top : top + side, 80 : 80 + side] = tool.photographs.NAMES.index(name) + 1
    colours = {name: {colour: 0.9} for name, colour, _ in garments}
    return tool.photographs.View(number, np.zeros((height, width, 3), np.uint8), labels, colours)


@pytest.fixture(scope="module")
def views(tool: Any) -> list[Any]:
    return [
        person(tool, 0, ("dress", "red", 50), ("bag", "black", 30)),
        person(tool, 1, ("dress", "blue", 50), ("hat", "black", 30)),
        person(tool, 2, ("jeans", "blue", 50), ("bag", "brown", 30)),
        person(tool, 3, ("jeans", "blue", 50), ("bag", "black", 5)),  # hardly to be seen: nobody can say
    ]


def test_queries_are_true_for_one_person(tool: Any, views: list[Any]) -> None:
    """Read off the four persons by hand."""
    found = tool.queries.all_queries(views, unseen_pairs=True)
    assert {(text, who) for text, who, *_ in found["garment"]} == {("a hat", 1)}
    assert {(text, who) for text, who, *_ in found["colour"]} == {
        ("a red dress", 0),
        ("a blue dress", 1),
        ("a black hat", 1),
    }
    assert not [text for text, *_ in found["without"] if "bag" in text]
    assert ("a blue jeans", 2) not in {(text, who) for text, who, *_ in found["two"]}
    assert ("a blue dress and a hat", 1) in {(text, who) for text, who, *_ in found["two"]}
    assert ("a red dress and a bag", 0) in {(text, who) for text, who, *_ in found["two"]}


def test_pairs_that_are_kept_out_are_never_trained(tool: Any) -> None:
    pairs = [(colour, name) for colour in tool.photographs.COLOURS for name in tool.photographs.NAMES]
    kept = [pair for pair in pairs if tool.queries.kept_out(*pair)]
    assert 0.1 < len(kept) / len(pairs) < 0.25
    colour, name = kept[0]
    others = [person(tool, number, ("romper" if name != "romper" else "dress", "beige", 50)) for number in range(3)]
    strip = [person(tool, 9, (name, colour, 50)), *others]
    asked = {test: tool.queries.all_queries(strip, test)["colour"] for test in (False, True)}
    phrase = tool.queries.phrase(name, colour)
    assert phrase in {text for text, *_ in asked[True]}
    assert phrase not in {text for text, *_ in asked[False]}
    assert not set(tool.queries.WORDINGS) & set(tool.queries.UNSEEN_WORDINGS)


def test_masks_and_cells_of_a_strip(tool: Any, views: list[Any]) -> None:
    query = tool.queries.Query("a red dress", 0, ("dress",), "colour", False)
    scene = tool.scenes._strip(views, [query])
    width = tool.photographs.WIDTH
    assert scene.asked[0].target.sum() == 280 * 100
    assert not scene.asked[0].target[:, width:].any()
    assert scene.asked[0].focus.sum() * 32**2 == pytest.approx(50 * 50)
    things, named = tool.losses.wanted_cells(scene)
    assert things.shape == (1, scene.grid[0] * scene.grid[1])
    assert (named & things).any()


def test_colour_words(tool: Any) -> None:
    shares = tool.photographs.colour_shares(np.array([[200, 30, 30]] * 3 + [[10, 10, 10]], dtype=np.uint8))
    assert shares["red"] == 0.75
    assert shares["black"] == 0.25


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


def test_what_is_asked_of_natural_pictures(tool: Any) -> None:
    """One cat; three dogs, of which the one in the middle is the biggest, and a speck that counts for nothing."""

    def thing(name: str, left: int, side: int) -> Any:
        mask = np.zeros((64, 96), dtype=bool)
        mask[10 : 10 + side, left : left + side] = True
        return tool.scenes.Thing(name, mask)

    things = [thing("cat", 40, 12), thing("dog", 0, 12), thing("dog", 20, 20), thing("dog", 80, 12)]
    things += [thing("bird", 60, 2)]
    found = {text: mask for text, mask, _ in tool.scenes._about_things(things, 64 * 96)}
    assert set(found) == {"the cat", "the dog on the left", "the dog on the right", "the biggest dog"}
    assert found["the dog on the left"][:, :12].any()
    assert found["the dog on the right"][:, 80:].any()
    assert found["the biggest dog"].sum() == 400


def test_a_flipped_and_cut_photograph_keeps_its_labels(tool: Any, tmp_path: Path) -> None:
    """A red coat on one half: wherever it lands, its pixels are labelled a coat; facts are read back from the file."""
    for folder in ("photos", "labels"):
        (tmp_path / folder).mkdir()
    pixels = np.full((384, 256, 3), 230, dtype=np.uint8)
    pixels[:, :128] = (190, 25, 35)
    labels = np.zeros((384, 256), dtype=np.uint8)
    labels[:, :128] = 13
    names = ["null"] * 13 + ["coat", *sorted({n for group in tool.photographs.GARMENTS.values() for n in group})]
    (tmp_path / "labels.json").write_text(json.dumps(names))
    Image.fromarray(pixels).save(tmp_path / "photos" / "0001.jpg", quality=95)
    Image.fromarray(labels).save(tmp_path / "labels" / "0001.png")
    photographs = tool.photographs.Photographs(tmp_path, tmp_path / "facts.json")
    again = tool.photographs.Photographs(tmp_path, tmp_path / "facts.json")
    assert again.colours == photographs.colours
    flipped = 0
    for seed in range(6):
        view = photographs.view(1, np.random.default_rng(seed))
        coat = view.labels == 1 + tool.photographs.NAMES.index("coat")
        inner = coat[:, 8:-8] & coat[:, :-16] & coat[:, 16:]  # away from the edge, which resizing blends
        red = view.pixels[:, 8:-8].astype(int)
        assert (red[..., 0] > red[..., 1] + 60)[inner].mean() > 0.99
        assert view.wears("coat")
        assert view.colour_of("coat") == "red"
        flipped += int(coat[:, -1].all())
    assert 0 < flipped < 6


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
