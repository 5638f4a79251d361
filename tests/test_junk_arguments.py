"""Junk through every parameter of every public function: an error of ours in one line, or it works."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakePlugin
from lisa_checkpoints import write_lisa
from stored_answers import set_of
from vlm_checkpoints import write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.evaluation import metrics
from tokenprune.evaluation.samples import sample
from tokenprune.plugins import registry
from tokenprune.sweeps.answers import store_answers
from tokenprune.sweeps.config import read_config
from tokenprune.sweeps.merge import merge
from tokenprune.sweeps.results import keep_rates
from tokenprune.testing.tiny_decoders import tiny_llama
from tokenprune.utils.images import to_rgb

JUNK: dict[str, Any] = {
    "None": None,
    "3": 3,
    "2.5": 2.5,
    "True": True,
    "nan": float("nan"),
    "text": "x",
    "no-unicode": "a \ud800 b",
    "bytes": b"x",
    "list": [],
    "list-of-None": [None],
    "dict": {},
    "dict-of-3": {"x": 3},
    "object": object(),
    "class": dict,
    "array": np.arange(12.0).reshape(3, 4),
    "tensor": torch.arange(12.0).reshape(3, 4),
    "nested": [[1, 2], [3]],
}
FASTV = tp.strategy("fastv", layer=1, keep=4)
PICTURE = np.zeros((24, 32, 3), np.uint8)
MASK = np.eye(4, dtype=bool)


def pruned(model: Any, strategy: Any, **options: Any) -> None:
    """A context and a prefill of a decoder in it, as `tokenprune.prune` is used."""
    with torch.no_grad(), tp.prune(model, strategy, **options):
        decoder = model if isinstance(model, torch.nn.Module) else tiny_llama(layers=2)
        decoder(torch.arange(1, 13)[None])


def prompt_masks() -> torch.Tensor:
    """bool [1, 12], eight image tokens."""
    return (torch.arange(12) // 2 > 0)[None] & (torch.arange(12) < 10)[None]


def prune_arguments() -> dict[str, Any]:
    """Arguments of `tokenprune.prune` that are right, and give every option something."""
    return {
        "model": tiny_llama(layers=4),
        "strategy": FASTV,
        "image_tokens": prompt_masks(),
        "query": None,
        "queries": None,
        "grid": None,
        "image_number": None,
        "vision": None,
        "seed": 0,
        "wait": False,
        "threads": "any",
        "strict": False,
    }


COMPARED = {"limit": 1, "timing_samples": 0, "timing_rounds": 1, "records": 0}
PUBLIC: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    # the function, and arguments that are right
    "strategy": (tp.strategy, lambda: {"name": "fastv", "budget": None, "layer": 2, "keep": 0.5}),
    "strategy-joined": (
        tp.strategy,
        lambda: {"name": "visionzip+fastv", "budget": None, "budgets": None, "parts": None},
    ),
    "Sequence": (lambda a, b, **rest: tp.Sequence(a, b, **rest), lambda: {"a": "divprune", "b": FASTV, "budget": 0.5}),
    "load": (tp.load, lambda: {"name_or_path": "lisa-tiny"}),
    "prune": (pruned, prune_arguments),
    "compatible": (tp.compatible, lambda: {"strategy": FASTV, "model": tiny_llama(layers=2)}),
    "sample": (sample, lambda: {"dataset": "shapes", "split": "val", "index": 0, "seed": 0}),
    "to_rgb": (to_rgb, lambda: {"image": PICTURE}),
    "overlap": (metrics.overlap, lambda: {"prediction": MASK, "target": MASK}),
    "expression_iou": (metrics.expression_iou, lambda: {"intersection": 1, "union": 2}),
    "giou": (metrics.giou, lambda: {"overlaps": [(1, 2)]}),
    "ciou": (metrics.ciou, lambda: {"overlaps": [(1, 2)]}),
    "size_of": (metrics.size_of, lambda: {"target": MASK}),
    "miou_by": (metrics.miou_by, lambda: {"groups": ["a"], "overlaps": [(1, 2)]}),
    "agreement": (metrics.agreement, lambda: {"masks": [MASK], "reference": [MASK]}),
    "predicted_pixels": (metrics.predicted_pixels, lambda: {"prediction": MASK, "target": MASK}),
    "precision_at": (metrics.precision_at, lambda: {"ious": [0.5], "threshold": 0.5}),
    "target_accuracy": (metrics.target_accuracy, lambda: {"has_target": [True], "is_empty": [False]}),
    "dataset": (tp.dataset, lambda: {"name": "shapes"}),
    "PositionPrior": (tp.PositionPrior, lambda: {"scores": MASK}),
    "PositionPrior.mean": (tp.PositionPrior.mean, lambda: {"maps": [MASK]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LISA checkpoint."""
    return write_lisa(tmp_path_factory.mktemp("lisa"))


@pytest.fixture
def _fakes(tmp_path: Path) -> Iterator[None]:
    registry.register_plugin(FakePlugin(tmp_path), "fakes")
    yield
    registry.unregister_plugin("fakes")


def check(function: Callable[..., Any], right: dict[str, Any], name: str, junk: str) -> None:
    """The function with junk for one argument: it works, or tells in one line of ours."""
    try:
        function(**{**right, name: JUNK[junk]})
    except tp.TokenPruneError as error:
        text = str(error)
        assert "\n" not in text
        assert "fix or uninstall" not in text  # whoever is to blame, it is no plugin


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("public", PUBLIC)
def test_a_junk_argument_is_refused_in_one_line_or_works(public: str, junk: str) -> None:
    function, right = PUBLIC[public]
    for name in right():
        check(function, right(), name, junk)


@pytest.mark.parametrize("public", PUBLIC)
def test_the_right_arguments_work(public: str) -> None:
    function, right = PUBLIC[public]
    function(**right())


def test_every_parameter_of_prune_is_tried() -> None:
    assert list(prune_arguments()) == list(inspect.signature(tp.prune).parameters)


@pytest.mark.usefixtures("_fakes")
@pytest.mark.parametrize("junk", JUNK)
def test_compare(junk: str) -> None:
    right = {"model": "fake", "dataset": "rectangles", "strategies": ["none"], "budget": 0.5, "split": "val", "seed": 0}
    right = {**right, **COMPARED, "extra_metrics": (), "progress": None, "threads": None, "protocol": "forced"}
    assert right.keys() == inspect.signature(tp.compare).parameters.keys()
    assert tp.compare(**right).samples == 1
    for name in right:
        if (name, junk) != ("progress", "class"):  # which can be called, and is the caller's own function
            check(tp.compare, right, name, junk)


@pytest.mark.parametrize("junk", JUNK)
def test_recommend(junk: str) -> None:
    right = {"model": tiny_llama(layers=4), "strategies": ["uniform"], "budget": 0.5, "image_tokens": 4, "batch": 1}
    right = {**right, "budget_ms": None, "text_tokens": 4, "seconds": 1.0, "rounds": 1, "results": None}
    right = {**right, "name": None, "progress": None, "threads": None}
    assert right.keys() == inspect.signature(tp.recommend).parameters.keys()
    assert tp.recommend(**right).rounds == 1
    for name in right:
        if (name, junk) != ("progress", "class"):
            check(tp.recommend, right, name, junk)


@pytest.mark.usefixtures("_fakes")
@pytest.mark.parametrize("junk", JUNK)
def test_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, junk: str) -> None:
    monkeypatch.chdir(tmp_path)  # junk may be the name of a folder
    config = {"models": "fake", "datasets": "rectangles", "strategies": "none", "budgets": 0.5, "seeds": 0, "limit": 1}
    right = {"config": config, "out": tmp_path / "run", "shard": None, "keep_masks": True, "accept_changes": False}
    right = {**right, "progress": None, "threads": None, "engine": "local"}
    assert right.keys() == inspect.signature(tp.sweep).parameters.keys()
    assert tp.sweep(**right).records == 1
    for name in right:
        if (name, junk) != ("progress", "class"):
            check(tp.sweep, right, name, junk)
    for key in config:
        check(lambda value, key=key: read_config({**config, key: value}), {}, "value", junk)
        check(lambda value, key=key: read_config({**config, key: [value]}), {}, "value", junk)
    for name in ("run", "every", "stages"):
        check(tp.read_results, {"run": tmp_path / "run", "every": False, "stages": True}, name, junk)
    check(tp.read_answers, {"run": tmp_path / "run"}, "run", junk)
    for name in ("run", "answers"):
        check(store_answers, {"run": tmp_path / "run", "answers": set_of()}, name, junk)
    for field in set_of():
        check(lambda value, field=field: store_answers(tmp_path / "run", {**set_of(), field: value}), {}, "value", junk)
    for name in ("run", "stage"):
        check(keep_rates, {"run": tmp_path / "run", "stage": None}, name, junk)
    for name in ("shards", "out"):
        check(merge, {"shards": [tmp_path / "run"], "out": tmp_path / "merged"}, name, junk)


@pytest.mark.parametrize("junk", JUNK)
def test_load_options(folder: Path, junk: str) -> None:
    for name in ("vision_tower", "dtype", "device", "device_map", "attn_implementation"):
        check(tp.load, {"name_or_path": folder}, name, junk)


@pytest.mark.parametrize("junk", JUNK)
def test_methods_of_segmentation_models(folder: Path, junk: str) -> None:
    model = tp.load(folder)
    encoded = model.encode_image(PICTURE)
    segment = {"image": encoded, "query": "a cat", "strategy": FASTV, "answer": "forced", "prompt": None}
    segment = {**segment, "max_new_tokens": 2, "is_sentence": None}
    assert len(model.segment(**segment).masks) == 1
    for name in segment:
        check(model.segment, segment, name, junk)
        check(model.segment, {**segment, "answer": "generate"}, name, junk)
    inputs = model.build_inputs(encoded, ["a cat"])
    for name in ("inputs", "strategy"):
        check(model.run_decoder, {"inputs": inputs, "strategy": None}, name, junk)
    for name in ("image", "queries", "is_sentence"):
        check(model.build_inputs, {"image": encoded, "queries": ["a cat"], "is_sentence": [False]}, name, junk)
    check(model.encode_image, {"image": PICTURE}, "image", junk)


@pytest.mark.skipif(not CURRENT, reason="the tiny processors are those of transformers 5.20 and later")
@pytest.mark.parametrize("junk", JUNK)
def test_methods_of_answering_models(tmp_path_factory: pytest.TempPathFactory, junk: str) -> None:
    model = tp.load(write_vlm(tmp_path_factory.mktemp("vlm") / "llava", "llava"))
    right = {"image": PICTURE, "prompt": "What is it?", "strategy": FASTV, "max_new_tokens": 2}
    for name in right:
        check(model.answer, right, name, junk)
        check(model.answer, {**right, "prompt": ["What?", "Why?"]}, name, junk)
    check(model.inputs, {"image": PICTURE, "prompt": "What?"}, "prompt", junk)
    given = {"model": model, "image": PICTURE, "strategy": tp.strategy("uniform"), "question": "What?"}
    assert given.keys() == inspect.signature(tp.embed).parameters.keys()
    for name in given:
        check(tp.embed, given, name, junk)
    for name in ("dtype", "device", "device_map", "attn_implementation", "revision"):
        check(tp.load, {"name_or_path": model.source}, name, junk)
