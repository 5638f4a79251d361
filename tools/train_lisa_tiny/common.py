"""What all phases share: a schedule in steps, checkpoints that a later start resumes from, dense targets."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import GRID, IMAGE_SIZE
from torch import Tensor, nn

from tokenprune.datasets.shapes import COLOURS, SHAPES, SIZES

MAX_OBJECTS = 10
SAVE_EVERY = 300.0  # seconds
LOG_EVERY = 60.0  # seconds
_COLOURS, _SIZES = list(COLOURS), list(SIZES)


@dataclass(frozen=True)
class Recipe:
    """What a run is: its folder, its seed, the layers whose first head is taught where to look (none: an empty tuple),
    and whether it computes in bfloat16, which is slower than float32 on machines without matrix units."""

    work: Path
    seed: int
    taught: tuple[int, ...]
    bfloat16: bool = False

    def precision(self) -> torch.autocast:
        """The context of forward passes."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        return {"seed": self.seed, "taught": list(self.taught)}


class Run:
    """One phase of `steps` steps: learning rate by step, a log of JSON lines, a checkpoint every five minutes.

    Everything random in a step comes from `generator()`, which depends on seed, phase and step alone; so a resumed
    run goes on as it would have without the interruption. SIGTERM and SIGINT end it after a step, with a checkpoint.
    """

    def __init__(
        self, recipe: Recipe, name: str, steps: int, parts: dict[str, nn.Module], optimizers: list[Any]
    ) -> None:
        self.recipe, self.name, self.steps = recipe, name, steps
        self.parts, self.optimizers = parts, optimizers
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.path = recipe.work / f"{name}.pt"
        self.spent, self.step = 0.0, 0
        self.extra: dict[str, Any] = {}
        self.averages: dict[str, float] = {}
        self._stop = False
        if self.path.exists():
            self._resume()
        self._last = self._saved = self._logged = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop = True

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != self.recipe.settings():
            raise SystemExit(f"{self.path} is of a run with {state['settings']}, not {self.recipe.settings()}")
        for key, part in self.parts.items():
            part.load_state_dict(state["parts"][key])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.spent, self.step, self.extra = state["spent"], state["step"], state["extra"]

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def progress(self) -> float:
        return min(self.step / self.steps, 1.0)

    def generator(self) -> np.random.Generator:
        """The random generator of the step that comes next."""
        return np.random.default_rng([self.recipe.seed, *self.name.encode(), self.step])

    def set_rate(self, warmup: float = 0.02, floor: float = 0.0, hold: float = 0.0) -> None:
        """Warm up, hold, then a cosine to `floor` of the peak at the planned end."""
        p = self.progress
        late = max(p - hold, 0.0) / (1 - hold)
        factor = min(1.0, (self.step + 1) / 60, 0.05 + p / warmup) * (
            floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * late))
        )
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def update(self, parameters: Iterable[Tensor], clip: float = 1.0) -> None:
        nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tick(self, values: dict[str, float], images: int) -> None:
        """Account for one step."""
        self.step += 1
        for key, value in {**values, "images": float(images)}.items():
            self.averages[key] = 0.97 * self.averages.get(key, value) + 0.03 * value
        now = time.monotonic()
        if now - self._logged > LOG_EVERY or self.done:
            self.log({k: round(v, 4) for k, v in self.averages.items()})
            self._logged = now

    def keep(self) -> None:
        """At the end of a step: write a checkpoint if it is time to. Ends the process if it was asked to stop."""
        now = time.monotonic()
        self.spent += now - self._last
        self._last = now
        if now - self._saved > SAVE_EVERY or self.done or self._stop:
            self.save()
            self._saved = now
        if self._stop:
            self.log({"stopped": True})
            raise SystemExit(0)

    def log(self, record: dict[str, Any]) -> None:
        stamp = {"phase": self.name, "step": self.step, "steps": self.steps, "spent": round(self.spent)}
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **stamp, **record})
        print(line, flush=True)
        with (self.recipe.work / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Replace the checkpoint in one step: a crash leaves the old one or the new one, whole."""
        state = {
            "settings": self.recipe.settings(),
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "spent": self.spent,
            "step": self.step,
            "extra": self.extra,
        }
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def decay_groups(modules: Iterable[nn.Module], rate: float, decay: float = 0.05) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": rate, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
    ]


def muon_and_adamw(modules: Iterable[nn.Module], rate: float) -> list[Any]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    parameters = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in parameters if p.ndim == 2 and "layers" in n and "embed" not in n and "rel_pos" not in n]
    theirs = {id(p) for p in matrices}
    others = [p for _, p in parameters if id(p) not in theirs]
    muon = torch.optim.Muon(matrices, lr=2.5 * rate, weight_decay=0.03, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))]


def attribute_codes(objects: Iterable[Any]) -> np.ndarray:
    """int64 [11, 3]: shape, colour, size of the object with each label; row 0 is the background.

    The background has the code after the last of each.
    """
    codes = np.tile(np.array([[len(SHAPES), len(_COLOURS), len(_SIZES)]]), (MAX_OBJECTS + 1, 1))
    for item in objects:
        codes[item.label] = SHAPES.index(item.shape), _COLOURS.index(item.colour), _SIZES.index(item.size)
    return codes


def alone_codes(objects: Iterable[Any]) -> np.ndarray:
    """float32 [11, 2]: 1 where the object with that label shares its colour, or its shape, with no other."""
    table = np.zeros((MAX_OBJECTS + 1, 2), dtype=np.float32)
    listed = list(objects)
    for column, word in enumerate(("colour", "shape")):
        values = [getattr(item, word) for item in listed]
        for item in listed:
            table[item.label, column] = values.count(getattr(item, word)) == 1
    return table


def centres(objects: Iterable[Any]) -> np.ndarray:
    """float32 [11, 2]: (x, y) in pixels of the object with each label."""
    table = np.zeros((MAX_OBJECTS + 1, 2), dtype=np.float32)
    for item in objects:
        table[item.label] = item.x, item.y
    return table


def patch_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which object covers a patch most, int64 [B, 256] (0 where less than an eighth is covered), and the pixel counts
    of every label, int32 [B, 256, 11]."""
    side = IMAGE_SIZE // GRID
    cells = labels.reshape(len(labels), GRID, side, GRID, side).transpose(0, 1, 3, 2, 4).reshape(-1, side * side)
    flat = cells.astype(np.int64) + np.arange(len(cells))[:, None] * (MAX_OBJECTS + 1)
    counts = np.bincount(flat.ravel(), minlength=len(cells) * (MAX_OBJECTS + 1)).reshape(len(labels), GRID * GRID, -1)
    best = counts[:, :, 1:].argmax(-1) + 1
    covered = counts[:, :, 1:].max(-1) >= side * side // 8
    return np.where(covered, best, 0), counts
