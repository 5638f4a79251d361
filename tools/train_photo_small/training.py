"""The main phase: projector, LoRA and read-outs, on 4, then 12, then all 30 layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import evaluate, fixed_scenes
from head import Eyes
from losses import dense_loss, pooled, query_loss
from model import PhotoModel
from runs import Phase
from scenes import Natural, Strips

from tokenprune.datasets.strips.photographs import Photographs
from tokenprune_adapters.photos.parts import CELL, gather_cells

KEPT = (0.5, 0.9)  # of the image tokens: cheaper, against overfitting, and what pruning does later
NATURAL = 0.12  # of the pictures
RATE = 1e-3


@dataclass(frozen=True)
class Stage:
    """Some steps on the decoder's first layers.

    Args:
        steps: how many.
        depths: the taps that learn; none: the projector alone.
        pictures: of a step.
        queries: of a picture, at most.
        persons: how many photographs a strip has, drawn anew for each; few are easier to tell apart.
        answer: also learn to answer with SEG.
        pool: cells a side that an image token stands for; with few tokens attention learns sooner which to look at.
        hint: how much the attention logits of a query's words are raised on what half of the queries name; falls to 0
            in half of the stage. What attention brings has to be of use before attention can learn what to bring.
        bias: how much they are raised on all image tokens; falls to 0 in the whole stage. A pretrained decoder attends
            to its first token so much that the rest is hardly felt.
        rate: of LoRA's learning. At 1e-3 and a picture a step its weights are mostly noise, a third of q's own norm.
    """

    steps: int
    depths: tuple[int, ...]
    pictures: int
    queries: int
    persons: tuple[int, ...]
    answer: bool = False
    pool: int = 1
    hint: float = 0.0
    bias: float = 0.0
    rate: float = RATE


ALIGN = 80  # steps of the projector alone, at first
DENSE = 1.0  # weight of what image tokens are named; less lets the other losses wear it off
STAGES = (
    Stage(800, (4,), 2, 10, (4,)),
    Stage(500, (4, 12), 2, 16, (2,)),
    Stage(600, (4, 12), 1, 16, (2,)),
    Stage(400, (4, 8, 12), 1, 16, (2,)),
    Stage(400, (4, 8, 12), 1, 16, (2, 2, 3), pool=2),
    Stage(700, (), 2, 16, (4,)),
    Stage(700, (4, 8, 12), 1, 16, (2,), pool=2),
    Stage(900, (4, 8, 12), 1, 16, (2, 3, 4, 4), hint=6.0),
    Stage(500, (4, 8, 12), 1, 16, (2, 3, 4, 4), hint=2.5, bias=4.0),
    Stage(250, (4, 8, 12), 1, 16, (2, 3, 4, 4), hint=4.0, bias=2.0),
    Stage(2400, (4, 8, 12), 3, 12, (2, 3, 4, 4), hint=3.0, rate=3e-4),
    Stage(1200, (12, 20, 30), 3, 12, (3, 4, 4, 4), True, rate=3e-4),
)


def stages(scale: float) -> list[Stage]:
    """The stages with their steps multiplied."""
    return [replace(one, steps=round(one.steps * scale)) for one in STAGES]


def place_in(plan: list[Stage], step: int) -> tuple[Stage, int]:
    """The stage of a step, and how many of its steps are done."""
    for one in plan:
        if step < one.steps:
            return one, step
        step -= one.steps
    raise ValueError("beyond the last step")


def used_before(plan: list[Stage], step: int) -> set[int]:
    """The depths whose taps have learnt before a step."""
    used: set[int] = set()
    for one in plan:
        if step <= 0:
            break
        used |= set(one.depths)
        step -= one.steps
    return used


def rate_of(plan: list[Stage], step: int) -> float:
    """Warm-up at the start of each stage; level in all but the last, where a cosine ends at a fiftieth."""
    stage, done = place_in(plan, step)
    warm = min(1.0, (done + 1) / 40)
    if stage is not plan[-1]:
        return stage.rate * warm
    late = done / stage.steps
    return stage.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


def optimizer_of(trained: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; matrices decay, and what is new learns faster than LoRA."""
    groups = []
    for lora in (True, False):
        for matrix in (True, False):
            chosen = [
                value
                for name, value in trained.items()
                if name.startswith("decoder.") == lora and (value.ndim >= 2) == matrix
            ]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": 0.0,
                        "scale": 1.0 if lora else 1.5,
                        "weight_decay": 0.05 if matrix else 0.0,
                    }
                )
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(
    work: Path, name: str, eyes: Eyes, model: PhotoModel, strips: Strips, natural: Natural, scale: float, every: int
) -> Phase:
    """Train to the end of the plan, or go on where a checkpoint stopped.

    Args:
        work: folder of checkpoints and log.
        name: of the checkpoint.
        eyes: trained and frozen.
        model: trained in place.
        strips, natural: training pictures.
        scale: of the number of steps.
        every: steps between evaluations on the validation photographs.
    """
    trained = model.trained()
    phase = Phase(work, name, trained, optimizer_of(trained))
    plan = stages(scale)
    total = sum(one.steps for one in plan)
    validation = Photographs(strips.photographs.folder, "val")
    model.train()
    phase.log(dtype=str(model.dtype), steps=total)
    while phase.step < total:
        stage, done = place_in(plan, phase.step)
        if stage.depths:
            depth = phase.extra.get("depth")
            if done == 0 and depth is not None:
                if depth != stage.depths[-1]:
                    phase.save(work / f"{name}-{depth}.pt")
                model.grow(set(stage.depths) - used_before(plan, phase.step), depth)
            phase.extra["depth"] = stage.depths[-1]
        _step(phase, eyes, model, strips, natural, stage, done, rate_of(plan, phase.step))
        if (phase.step % every == 0 and stage.depths) or phase.step == total:
            conditions = ("full",) if model.blind else ("full", "wrong")
            persons = max(stage.persons)
            held_out = fixed_scenes(Strips(validation, persons), 21, 40, 4)
            scores = evaluate(eyes, model, held_out, stage.depths[-1], conditions, pool=stage.pool)
            phase.log(depth=stage.depths[-1], persons=persons, val=scores)
    phase.save()
    return phase


def _step(
    phase: Phase, eyes: Eyes, model: PhotoModel, strips: Strips, natural: Natural, stage: Stage, done: int, rate: float
) -> None:
    rng = phase.begin_step(31)
    align = phase.step < ALIGN or not stage.depths
    sums: dict[str, list[float]] = {}
    for _ in range(stage.pictures):
        source: Natural | Strips = strips
        if not align:
            source = natural if rng.random() < NATURAL else _strips(strips, rng, stage.persons)
        scene = source.scene(rng, stage.queries, True)
        cells = torch.zeros(1, CELL, *scene.grid) if model.blind else gather_cells(eyes.levels(scene.pixels))
        tokens = model.image_tokens(cells)
        dense, named = dense_loss(model, tokens.float(), scene)
        if align:
            loss, report = dense, {}
        else:
            kept = hints = None
            if stage.hint > 0:
                strength = stage.hint * max(1 - done / (0.5 * stage.steps), 0)
                hints = torch.from_numpy(strength * (rng.random(len(scene.asked)) < 0.5))
            bias = stage.bias * (1 - done / stage.steps)
            if stage.pool > 1:
                tokens, _ = pooled(tokens, scene.grid, stage.pool)
            else:
                count = int(len(tokens) * rng.uniform(*KEPT))
                kept = torch.from_numpy(np.sort(rng.permutation(len(tokens))[:count]))
            loss, report = query_loss(model, tokens, scene, stage.depths, kept, stage.answer, stage.pool, hints, bias)
            loss = loss if model.blind else loss + DENSE * dense
        (loss / stage.pictures).backward()
        if source is not natural:
            for key, value in {**report, "named": named, "loss": float(loss.detach())}.items():
                sums.setdefault(key, []).append(value)
    phase.end_step({key: float(np.mean(values)) for key, values in sums.items()}, rate)


def _strips(strips: Strips, rng: np.random.Generator, persons: Sequence[int]) -> Strips:
    """The strips with one of several numbers of persons."""
    number = persons[0] if len(persons) == 1 else int(rng.choice(persons))
    return Strips(strips.photographs, number)
