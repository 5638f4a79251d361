"""Resumable phases: every step's chances come from its number, so that a resumed run is the run it would have been."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Phase:
    """One phase: its state, a log of JSON lines, a checkpoint every few minutes that replaces the last in one move.

    Args:
        folder: of checkpoints and log.
        name: of the phase; names its checkpoint.
        trained: what is trained, by name.
        optimizer: of it.
        every: seconds between checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        every: float = 300,
    ) -> None:
        self.folder, self.name, self.trained, self.optimizer, self.every = folder, name, trained, optimizer, every
        self.path = folder / f"{name}.pt"
        self.step, self.cpu = 0, 0.0
        self.extra: dict[str, Any] = {}
        self.averages: dict[str, float] = {}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            load_trained(trained, state["trained"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.cpu, self.extra = state["step"], state["cpu"], state["extra"]
            self.averages = state["averages"]
        self._saved = self._logged = time.monotonic()
        self._cpu = time.process_time()

    def begin_step(self, seed: int) -> np.random.Generator:
        """The generator of the coming step; torch's own is seeded with it."""
        torch.manual_seed(1_000_003 * seed + self.step)
        return np.random.default_rng([seed, self.step])

    def end_step(self, values: Mapping[str, float], rate: float) -> None:
        """Clip, update, account, and save where it is time to."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for key, value in values.items():
            if not math.isnan(value):
                self.averages[key] = 0.98 * self.averages.get(key, value) + 0.02 * value
        if time.monotonic() - self._logged > 60:
            self.log(rate=rate, **self.averages)
            self._logged = time.monotonic()
        if time.monotonic() - self._saved > self.every:
            self.save()

    def log(self, **record: Any) -> None:
        """Append a line; numbers with four digits."""
        self._account()
        short = {key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"phase": self.name, "step": self.step, "cpu_s": round(self.cpu), "at": now, **short})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self, path: Path | None = None) -> None:
        """Write the state whole, then put it in the old one's place."""
        self._account()
        path = path or self.path
        state = {
            "trained": {name: value.detach() for name, value in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "cpu": self.cpu,
            "extra": self.extra,
            "averages": self.averages,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)
        self._saved = time.monotonic()

    def _account(self) -> None:
        now = time.process_time()
        self.cpu += now - self._cpu
        self._cpu = now


def load_trained(trained: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Put saved values into parameters; both have the same names."""
    if set(trained) != set(state):
        raise ValueError(f"the checkpoint has other parameters: {sorted(set(trained) ^ set(state))[:5]}")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(state[name])
