"""Fine-tune a segmentation model under a pruning strategy, so that it learns to answer from the tokens that are left.

`python finetune.py --model lisa-tiny --strategy csp --budget 0.25 --steps 300 --out csp-25` writes a checkpoint that
`tokenprune compare --model csp-25` reads. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from objective import WEIGHTS, scene_losses
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from storage import LOG, save_model
from storage import Progress as Checkpoints
from torch import nn
from transformers import get_scheduler

import tokenprune as tp
from tokenprune.core.by_name import parse_text
from tokenprune.datasets.base import Dataset, Scene
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.utils.arguments import instance, whole_number
from tokenprune_adapters.segmentation.segmenter import Segmenter

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BUFFER = 32  # scenes that the next one is drawn from, since files stand in an order of their own


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lisa-tiny", help="a name, folder or hub id, as of tokenprune.load")
    parser.add_argument("--strategy", default="csp", help="a name, or name:option=value,…; none trains unpruned")
    parser.add_argument("--budget", type=float, help="of the strategy")
    parser.add_argument("--dataset", default="shapes", help="as of tokenprune.dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=2, help="scenes per step, each a batch; gradients accumulate")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate at its highest")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train LoRA in place of all weights")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16; by default float32 on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    return parser.parse_args(arguments)


def scenes(dataset: Dataset, split: str, seed: int) -> Iterator[Scene]:
    """Scenes of a split without end, shuffled in a buffer, the same in every run."""
    draw, buffer = random.Random(seed), []
    while True:
        found = False
        for scene in dataset.scenes(split):
            found = True
            buffer.append(scene)
            if len(buffer) > BUFFER:
                yield buffer.pop(draw.randrange(len(buffer)))
        if not found:
            raise InputError(f"split {split!r} of dataset {dataset.name!r} has no scene to train on")


def prepared(model: Any, lora: int, checkpointing: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """The parameters to train, by name, and the peft model around the decoder, None without LoRA.

    Towers, projector and mask head stay as they are; the decoder and what turns its states into prompts of the mask
    head are trained.
    """
    model.requires_grad_(False)
    model.mask_projection.requires_grad_(True)
    around = None
    if lora:
        import peft

        around = peft.get_peft_model(
            model.decoder, peft.LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=PROJECTIONS)
        )
    else:
        model.decoder.requires_grad_(True)
    model.decoder.train()
    if checkpointing:  # before any context is open
        model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}, around


def train(given: argparse.Namespace) -> Path:
    """Run or resume a training; the folder of the trained model."""
    torch.manual_seed(given.seed)
    for name in ("steps", "scenes", "save_every"):
        whole_number(f"--{name.replace('_', '-')}", getattr(given, name), 1)
    name, chosen = parse_text(given.strategy)
    strategy = tp.strategy(name, **chosen, **({} if given.budget is None else {"budget": given.budget}))
    data = tp.dataset(given.dataset)
    model = tp.load(given.model, device=given.device, **({"dtype": given.dtype} if given.dtype else {}))
    instance("--model", model, Segmenter, "a segmentation model: LISA, GLaMM, PixelLM")
    weights, around = prepared(model, given.lora, given.checkpointing)
    optimiser = torch.optim.AdamW(weights.values(), lr=given.rate, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimiser, given.steps // 20 + 1, given.steps)
    settings = {
        name: value
        for name, value in vars(given).items()
        if name not in ("out", "save_every", "device", "checkpointing")  # neither changes what is trained
    }
    stored = Checkpoints(given.out, settings, weights, optimiser, schedule)
    drawn = itertools.islice(scenes(data, given.split, given.seed), stored.step * given.scenes, None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task("steps", total=given.steps, completed=stored.step, loss="")
        for step in range(stored.step, given.steps):
            parts = one_step(model, list(itertools.islice(drawn, given.scenes)), strategy)
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            with (given.out / LOG).open("a") as file:
                file.write(json.dumps({"step": step + 1, **parts}) + "\n")
            if (step + 1) % given.save_every == 0 or step + 1 == given.steps:
                stored.save(step + 1)
            bar.update(task, advance=1, loss=", ".join(f"{name} {value:.3f}" for name, value in parts.items()))
    if around is not None:
        around.merge_and_unload()
    save_model(model, given.model, given.out)
    return Path(given.out)


def one_step(model: Any, batch: list[Scene], strategy: tp.Strategy) -> dict[str, float]:
    """Accumulate the gradients of some scenes; the mean of each part of the loss."""
    means: dict[str, float] = dict.fromkeys(WEIGHTS, 0.0)
    for scene in batch:
        parts = scene_losses(model, scene, strategy)
        loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in parts.items():
            means[name] += value.item() / len(batch)
    return means


if __name__ == "__main__":
    try:
        folder = train(options())
    except TokenPruneError as error:
        sys.exit(f"error: {error}")
    print(f"trained model: {folder}; compare it: tokenprune compare --model {folder}")
