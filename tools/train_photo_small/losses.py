"""The losses of a picture's queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from model import PhotoModel
from scenes import CLASSES, Scene, coverage
from torch import Tensor
from torch.nn import functional

from tokenprune.datasets.strips.colours import COLOURS
from tokenprune.datasets.strips.photographs import NAMES


def mass_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """-log of the probability on the wanted cells, mean over rows that want any; [n, N] and bool [n, N]."""
    rows = wanted.any(-1)
    if not rows.any():
        return logits.sum() * 0
    logits, wanted = logits.float()[rows], wanted[rows]
    inside = logits.masked_fill(~wanted, -torch.inf).logsumexp(-1)
    return (logits.logsumexp(-1) - inside).mean()


def wanted_cells(scene: Scene) -> tuple[Tensor, Tensor]:
    """The cells of each query's thing and of what it names, bool [n, N] each."""
    things = torch.from_numpy(np.stack([coverage(asked.target) for asked in scene.asked])).flatten(1)
    named = torch.from_numpy(np.stack([asked.focus for asked in scene.asked])).flatten(1)
    # a small thing has no cell that it half fills: its best one counts
    return things >= things.amax(-1, keepdim=True).clamp(max=0.4), named >= named.amax(-1, keepdim=True).clamp(
        min=1e-4, max=0.15
    )


def dense_loss(model: PhotoModel, tokens: Tensor, scene: Scene) -> tuple[Tensor, float]:
    """Image tokens to the embeddings of the words for what they show, and to the words of each query; the garment hit
    rate beside it."""
    classes, colours = torch.from_numpy(scene.classes).flatten(), torch.from_numpy(scene.colours).flatten()
    words = torch.cat([torch.ones(len(CLASSES) - 1), torch.tensor([0.25])])  # most cells are background
    if not (classes >= 0).any():
        return tokens.sum() * 0, float("nan")
    named, tinted = model.name_tokens(tokens, CLASSES), model.name_tokens(tokens, list(COLOURS))
    loss = functional.cross_entropy(named, classes, ignore_index=-1, weight=words)
    coloured = colours >= 0
    if coloured.any():
        loss = loss + functional.cross_entropy(tinted[coloured], colours[coloured])
    likely = torch.cat([named.log_softmax(-1)[:, : len(NAMES)], tinted.log_softmax(-1)], 1)
    said = torch.tensor([[f" {word}" in f" {one.text}" for word in (*NAMES, *COLOURS)] for one in scene.asked])
    positive = torch.tensor([one.kind != "without" for one in scene.asked])
    loss = loss + mass_loss(said.float() @ likely.T, wanted_cells(scene)[1] & positive[:, None])
    garments = (classes >= 0) & (classes < len(CLASSES) - 2)
    hit = (named[garments].argmax(-1) == classes[garments]).float().mean() if garments.any() else torch.tensor(0.0)
    return loss, float(hit)


def pooled(
    values: Tensor, grid: tuple[int, int], pool: int, how: Callable[..., Tensor] = functional.avg_pool2d
) -> tuple[Tensor, tuple[int, int]]:
    """Values [N, H] of a grid's cells averaged (or what `how` does) over squares of `pool` cells a side, and the grid
    of these."""
    found = how(values.T.unflatten(1, grid)[None], pool, ceil_mode=True)[0]
    return found.flatten(1).T, (found.shape[1], found.shape[2])


def query_loss(
    model: PhotoModel,
    tokens: Tensor,
    scene: Scene,
    depths: Sequence[int],
    kept: Tensor | None,
    answer: bool,
    pool: int = 1,
    hints: Tensor | None = None,
    bias: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of all queries of a scene, and figures of the last depth.

    Args:
        model: read with its image tokens.
        tokens: [N, H], averaged over squares if `pool` says so.
        scene: with queries.
        depths: the taps that learn; the last counts most.
        kept: the image tokens that are kept, see `PhotoModel.read`.
        answer: also learn to answer with SEG.
        pool: cells a side that an image token stands for.
        hints: [n], how much each query's attention to what it names is raised.
        bias: how much every query's attention to all image tokens is raised.
    """
    things, named = wanted_cells(scene)
    shown, grid = pooled(named.float().T, scene.grid, pool, functional.max_pool2d)
    aimed = shown.T > 0 if kept is None else shown.T[:, kept] > 0
    hint = None if hints is None else bias + hints[:, None] * aimed
    found = model.read(tokens, [asked.text for asked in scene.asked], depths, kept, hint)
    total, report = tokens.sum() * 0, {}
    for depth in depths:
        tap = model.taps[str(depth)]
        states, images = found[depth]
        logits = tap.read(states, *scene.grid)
        pointer = tap.point_at(states, images)
        person, part = mass_loss(logits, things), mass_loss(logits, named)
        looked = mass_loss(pointer, aimed)
        # a place that attention brings from an image token can be read before attention has learnt which to bring
        places = torch.arange(len(images)) if kept is None else kept
        own = functional.cross_entropy(tap.read(images, *grid), places)
        last = depth == depths[-1]
        total = total + (1.0 if last else 0.3) * (person + 0.5 * part + 0.3 * own)
        total = total + (0.5 if last else 1.5) * looked  # what resembles each other early, later layers can look for
        best = logits.detach().argmax(-1, keepdim=True)
        report = {
            "person": float(person.detach()),
            "part": float(part.detach()),
            "pointer": float(looked.detach()),
            "own": float(own.detach()),
            "hit": float(things.gather(1, best).float()[slice(None) if hints is None else hints == 0].mean()),
        }
        if answer and depth == depths[-1]:
            said = functional.linear(states.to(model.dtype), model.decoder.model.embed_tokens.weight).float()
            total = total + 0.05 * functional.cross_entropy(said, torch.full((len(states),), model.seg))
    return total, report
