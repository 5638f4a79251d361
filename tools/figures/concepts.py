"""Figures of the page on concepts, drawn from runs of a tiny random decoder and from stages that strategies declare.

python tools/figures/concepts.py [FOLDER]      docs/images/concepts/*.svg

Every picture carries the numbers that it shows, as JSON in the description of its metadata.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drawing
import torch
from stages import IMAGES
from torch import Tensor

import tokenprune as tp
from tokenprune import Shape
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.trace import Trace
from tokenprune.testing.tiny_decoders import tiny_llama

Data = dict[str, Any]
LAYERS = 6
BEFORE, IMAGE = 4, 16  # text tokens before the image and image tokens in the example of the page
CSP = {"representatives": 4, "keep": 2, "scatter_at": 2, "prune_at": 4}
NEW = 3  # generated tokens
SHAPE, BUDGET, SPENDERS = Shape(layers=12, image_tokens=256), 0.5, ("prumerge+", "fastv", "pyramiddrop", "csp")
PICTURE = """
    a a a a b b
    a a a a b b
    c c c c b b
    c c d d b b
    c c d d d d
    c c d d d d
"""
MERGED = 9


def example() -> tuple[Tensor, Tensor]:
    """Ids int64 [1, 24] and image tokens bool [1, 24] of the page's example."""
    ids = torch.arange(1, 25)[None]
    image = torch.zeros(1, 24, dtype=torch.bool)
    image[:, BEFORE : BEFORE + IMAGE] = True
    return ids, image


def pruned(strategy: tp.Strategy, ids: Tensor, image: Tensor) -> tuple[Trace, list[Tensor], list[Tensor]]:
    """One prefill: its trace, and what its layers were given.

    Returns:
        The trace; per layer and once more for the final norm, states [M, width]; per layer, rotary positions int64 [M].
    """
    llama = tiny_llama(LAYERS)
    decoder = llama.model
    states: list[Tensor] = []
    positions: list[Tensor] = []
    every = decoder.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])[0][0]

    def keep_states(module: Any, args: tuple[Any, ...]) -> None:
        states.append(args[0][0].clone())

    def keep_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions.append(torch.cdist(kwargs["position_embeddings"][0][0], every).argmin(-1))

    for layer in decoder.layers:
        layer.input_layernorm.register_forward_pre_hook(keep_states)
        layer.self_attn.register_forward_pre_hook(keep_positions, with_kwargs=True)
    decoder.norm.register_forward_pre_hook(keep_states)
    with torch.no_grad(), tp.prune(llama, strategy, image_tokens=image) as run:
        llama(ids)
    return run.trace, states, positions


def fates(trace: Trace) -> list[str]:
    """Per layer, a letter for each image token of the first row: (a)ctive, (p)arked or (d)ropped."""
    letters = ["a" * int(trace.exists[0].sum())] * LAYERS
    for stage in trace.stages:
        marks = zip(stage.active[0].tolist(), stage.parked[0].tolist(), strict=True)
        letters[stage.layer :] = ["".join("a" if a else "p" if p else "d" for a, p in marks)] * (LAYERS - stage.layer)
    return letters


def sequence() -> Data:
    """A layout of two rows, the second padded on the left and with two images."""
    rows = ("ttiiiiiiiiitmst", "ptiiiitiiiitmst")  # (p)adding, (t)ext, (i)mage, (m)ask query, (s)eg
    marked = {letter: torch.tensor([[found == letter for found in row] for row in rows]) for letter in "pims"}
    queries = {"mask_query": marked["m"], "seg": marked["s"]}
    layout = SequenceLayout.from_mask(marked["i"], ~marked["p"], queries=queries)
    return {
        "valid": layout.valid.int().tolist(),
        "slots": layout.slots.tolist(),
        "image": layout.gather_slots(layout.image_number).tolist(),
        "grid": layout.gather_slots(layout.grid).tolist(),
        "queries": {name: layout.query_rows(name).flatten().tolist() for name in (*queries, "last")},
    }


def stages() -> Data:
    """What every image token is in every layer of the page's example."""
    trace, _, _ = pruned(tp.strategy("csp", **CSP), *example())
    return {"fates": fates(trace), "stages": [[stage.name, stage.kind, stage.layer] for stage in trace.stages]}


def parked() -> Data:
    """How far the states of three tokens of the example are from their embeddings, relative to those.

    At the entry of every layer and after the last. One token for each life that tokens have. A state is seen in layers
    where its token is active, and behind the last; in between it is the one that is seen next.
    """
    ids, image = example()
    trace, states, _ = pruned(tp.strategy("csp", **CSP), ids, image)
    lives = ["".join(life) for life in zip(*fates(trace), strict=True)]
    chosen = {life: lives.index(life) for life in sorted(set(lives))}
    tracks = {}
    for life, token in chosen.items():
        state = states[-1][BEFORE + token]
        track = [state]
        for layer in reversed(range(LAYERS)):
            if life[layer] == "a":
                state = states[layer][BEFORE + sum(other[layer] == "a" for other in lives[:token])]
            track.insert(0, state)
        start = tiny_llama(LAYERS).model.embed_tokens(ids)[0, BEFORE + token].detach()
        tracks[life] = [round(float((state - start).norm() / start.norm()), 2) for state in track]
    return {"tokens": chosen, "tracks": tracks}


def merged() -> Data:
    """Which token each token of a 6×6 grid went into, and the mass of those that are left."""
    letters = re.findall(r"[a-z]", PICTURE)
    ids = torch.tensor([[1, 2, *(10 + 13 * "abcd".index(letter) for letter in letters), 3, 4]])
    image = torch.zeros_like(ids, dtype=torch.bool)
    image[:, 2:-2] = True
    trace, _, _ = pruned(tp.strategy("tome", layers=(1,), keep=MERGED), ids, image)
    (stage,) = trace.stages
    assert stage.lineage is not None
    grid = trace.layout.gather_slots(trace.layout.grid)[0]
    into = {int(j): int(k) for k, j in stage.lineage[0].nonzero() if stage.active[0, k]}
    return {
        "cells": grid.tolist(),
        "content": "".join(letters),
        "into": [into[token] for token in range(len(letters))],
        "mass": {str(k): round(float(stage.mass[0, k]), 2) for k in stage.kept[0]},
    }


def budgets() -> Data:
    """Image tokens entering each layer, as strategies with the same budget declare them."""
    counts = {}
    for name in SPENDERS:
        ledger = declared_ledger(tp.strategy(name, budget=BUDGET).bind(SHAPE), SHAPE)
        counts[name] = [entry.image[0] for entry in ledger.entries]
    return {"counts": counts, "total": SHAPE.image_tokens, "budget": BUDGET}


def positions() -> Data:
    """Rotary positions in the last layer under both policies, and which tokens they belong to."""
    ids, image = torch.arange(1, 15)[None], torch.zeros(1, 14, dtype=torch.bool)
    image[:, 2:11] = True
    data: Data = {"image": image[0].int().tolist()}
    for policy in ("keep", "renumber"):
        strategy = tp.strategy("pyramiddrop", layers=(2,), keep=(4,), positions=policy)
        trace, _, given = pruned(strategy, ids, image)
        present = ~image[0]
        present[trace.layout.slots[0][trace.active(LAYERS - 1)[0]]] = True
        data["all"] = given[0].tolist()
        data[policy] = [present.nonzero().flatten().tolist(), given[-1].tolist()]
    return data


def caches() -> Data:
    """Tokens in each layer's cache, after the prefill and after generating, and the length that layers report."""
    ids, image = example()
    llama = tiny_llama(LAYERS)
    with torch.no_grad(), tp.prune(llama, tp.strategy("fastv", layer=2, keep=4), image_tokens=image) as run:
        prefill = llama(ids, use_cache=True).past_key_values.layers
        before = [(layer.keys.shape[2], layer.get_seq_length()) for layer in prefill]
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
        after = llama.generate(ids, max_new_tokens=NEW, **options).past_key_values.layers
    return {
        "text": [entry.other[0] for entry in run.trace.ledger.entries],
        "image": [entry.image[0] for entry in run.trace.ledger.entries],
        "prefill": [held for held, _ in before],
        "prefill reported": [length for _, length in before],
        "generated": [layer.keys.shape[2] for layer in after],
        "generated reported": [layer.get_seq_length() for layer in after],
    }


FIGURES: dict[str, tuple[Callable[[], Data], Callable[[Data], Any]]] = {
    "sequence": (sequence, drawing.sequence),
    "stages": (stages, drawing.stages),
    "parked": (parked, drawing.parked),
    "merged": (merged, drawing.merged),
    "budgets": (budgets, drawing.budgets),
    "positions": (positions, drawing.positions),
    "caches": (caches, drawing.caches),
}


def main(folder: Path = IMAGES / "concepts") -> None:
    """Write every figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (measure, draw) in FIGURES.items():
        drawing.write(draw, measure(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(*(Path(text) for text in sys.argv[1:2]))
