"""What all phases share: a clock-driven schedule, checkpoints that a later start resumes from, dense targets."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import GRID, IMAGE_SIZE
from torch import Tensor, nn

from tokenprune.datasets.shapes import COLOURS, SHAPES, SIZES

MAX_OBJECTS = 10
_COLOURS, _SIZES = list(COLOURS), list(SIZES)


class Run:
    """One phase: learning rate by elapsed training time, a log of JSON lines, a checkpoint every minute.

    `seconds` is the planned length; time spent before a resume counts.
    """

    def __init__(
        self, folder: Path, name: str, seconds: float, parts: dict[str, nn.Module], optimizers: list[Any]
    ) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds
        self.parts, self.optimizers = parts, optimizers
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.path = folder / f"{name}.pt"
        self.spent, self.step, self.extra = 0.0, 0, {}
        self.averages: dict[str, float] = {}
        if self.path.exists():
            self._resume()
        self._last = self._saved = self._logged = time.monotonic()

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        for key, part in self.parts.items():
            part.load_state_dict(state["parts"][key])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.spent, self.step, self.extra = state["spent"], state["step"], state["extra"]

    @property
    def done(self) -> bool:
        return self.spent >= self.seconds

    @property
    def progress(self) -> float:
        return min(self.spent / self.seconds, 1.0)

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

    def tick(self, values: dict[str, float], images: int, every: float = 30.0) -> bool:
        """Account for one step; True when a minute has passed and a checkpoint was written."""
        now = time.monotonic()
        self.spent += now - self._last
        self._last = now
        self.step += 1
        values = {**values, "images": float(images)}
        for key, value in values.items():
            self.averages[key] = 0.97 * self.averages.get(key, value) + 0.03 * value
        if now - self._logged > every:
            self.log({"step": self.step, **{k: round(v, 4) for k, v in self.averages.items()}})
            self._logged = now
        if now - self._saved > 60 or self.done:
            self.save()
            return True
        return False

    def pause(self) -> Callable[[], None]:
        """Stop the clock (for an evaluation); call the result to go on."""

        def go_on() -> None:
            self._last = time.monotonic()

        return go_on

    def log(self, record: dict[str, Any]) -> None:
        line = json.dumps({"phase": self.name, "spent": round(self.spent), **record})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        state = {
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "spent": self.spent,
            "step": self.step,
            "extra": self.extra,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)
        self._saved = time.monotonic()


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
