"""The rows and columns of the compatibility matrix: a tiny model of every family, and strategies with options.

A strategy that is registered, and a family that has a tiny model, are in it by themselves.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glamm_checkpoints
import lisa_checkpoints
import numpy as np
import pixellm_checkpoints
import sa2va_checkpoints
import torch
from clip_checkpoints import whole_clip
from photo_parts import tiny_photo_model
from vlm_families import FAMILIES

import tokenprune as tp
from tokenprune.core.trace import Trace
from tokenprune.evaluation.contenders import contenders
from tokenprune.testing.tiny_decoders import tiny_llama

BUDGET = 0.5
QUERIES = ["the cat", "the thing that is behind the red car"]


def whole(image: Any) -> np.ndarray[Any, Any]:
    """A segmenter that finds one instance, the upper half."""
    masks = np.zeros((1, *image.shape[:2]), dtype=bool)
    masks[:, : image.shape[0] // 2] = True
    return masks


# columns -------------------------------------------------------------------------------------------------------------

OTHER_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    'csp, clustering="cls_attention"': ("csp", {"clustering": "cls_attention"}),
    'csp, clustering="kmeans"': ("csp", {"clustering": "kmeans"}),
    'csp, clustering="seg_first"': ("csp", {"clustering": "seg_first"}),
    'csp, clustering="seg_first", segmenter=f': ("csp", {"clustering": "seg_first", "segmenter": whole}),
    'csp, reentry="delta"': ("csp", {"reentry": "delta"}),
    'prumerge, positions="keep"': ("prumerge", {"positions": "keep"}),
    'prumerge+, positions="keep"': ("prumerge+", {"positions": "keep"}),
    'pyramiddrop, positions="keep"': ("pyramiddrop", {"positions": "keep"}),
    'sparsevlm, positions="keep"': ("sparsevlm", {"positions": "keep"}),
    'vscan, variant="qwen"': ("vscan", {"variant": "qwen"}),
}
"""Options with which a strategy reads something else than with its defaults."""


def columns() -> dict[str, tp.Strategy]:
    """Every strategy that this distribution registers, at the budget if it takes one, and `OTHER_OPTIONS`."""
    own = [name for name, entry in tp.strategies().items() if entry.distribution == "tokenprune-vlm"]
    takes = {name: contenders([name], BUDGET)[0].strategy.budget is not None for name in own}
    found = {name: tp.strategy(name, BUDGET if takes[name] else None) for name in own}
    found.update({label: tp.strategy(name, BUDGET, **options) for label, (name, options) in OTHER_OPTIONS.items()})
    return dict(sorted(found.items(), key=lambda item: own.index(item[1].name)))


# rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A row.

    Attributes:
        title: the family, as people call it.
        adapter: name of the adapter that knows it.
        model: what `tokenprune.compatible` is asked about.
        run: runs the strategy on a picture, towers included, and gives the trace.
        modules: everything that must not run where a strategy is refused.
    """

    title: str
    adapter: str
    model: Any
    run: Callable[[tp.Strategy], Trace]
    modules: torch.nn.Module


SEGMENTERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "lisa": ("LISA", lisa_checkpoints.write_lisa),
    "glamm": ("GLaMM", glamm_checkpoints.write_glamm),
    "pixellm": ("PixelLM", pixellm_checkpoints.write_pixellm),
    "sa2va": ("Sa2VA", sa2va_checkpoints.write_sa2va),
}
PHOTOS = "photos"
PLAIN = "decoder"
_FOLDER = tempfile.TemporaryDirectory()  # stays: CLIP's text tower is read when it is first needed
ROWS = [*SEGMENTERS, PHOTOS, *FAMILIES, PLAIN]


@functools.cache
def row(name: str) -> Model:
    """A tiny random model of a family; built once."""
    if name in SEGMENTERS:
        return _segmenter(name)
    if name == PHOTOS:
        return _segmenting("photo-small", name, tiny_photo_model())
    return _decoder() if name == PLAIN else _vlm(name)


def _segmenter(name: str) -> Model:
    """With a whole CLIP model as its tower, like the ones that released checkpoints name, if it has one beside it."""
    title, write = SEGMENTERS[name]
    folder = write(Path(_FOLDER.name) / name)
    if (folder / "vision_tower").is_dir():
        whole_clip(folder / "vision_tower")
    return _segmenting(title, name, tp.load(folder))


def _segmenting(title: str, adapter: str, model: Any) -> Model:
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)

    def run(strategy: tp.Strategy) -> Trace:
        trace = model.segment(image, QUERIES, strategy=strategy).trace
        assert trace is not None
        return trace

    return Model(title, adapter, model, run, model)


def _vlm(name: str) -> Model:
    from tokenprune_adapters.hf.families import FAMILIES as KNOWN

    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs([(24, 32), (40, 20)])

    def run(strategy: tp.Strategy) -> Trace:
        with torch.inference_mode(), tp.prune(model, strategy) as pruned:
            model(**inputs)
        return pruned.trace

    return Model(KNOWN[model.config.model_type].title, "transformers", model, run, model)


def _decoder() -> Model:
    model = tiny_llama()
    prompt = torch.arange(1, 25)[None]
    image_tokens = torch.zeros(1, 24, dtype=torch.bool)
    image_tokens[:, 4:20] = True

    def run(strategy: tp.Strategy) -> Trace:
        with torch.inference_mode(), tp.prune(model, strategy, image_tokens=image_tokens) as pruned:
            model(prompt)
        return pruned.trace

    return Model("a decoder alone, with `image_tokens=`", "", model, run, model)
