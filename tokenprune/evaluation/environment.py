"""The environment of an evaluation, for judging its times and repeating it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import tokenprune
from tokenprune.utils.threads import ThreadChoice, present


def describe(decoder: Any = None, threads: ThreadChoice | None = None) -> dict[str, str | int]:
    """Versions, machine, threads, and the decoder's device and dtype.

    Args:
        decoder: the model's decoder.
        threads: that were used; by default those of the process now.
    """
    threads = threads or present()
    found: dict[str, str | int] = {
        "tokenprune": tokenprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": threads.count,
        "threads_chosen_by": threads.chosen_by,
    }
    parameter = next(iter(decoder.parameters()), None) if decoder is not None else None
    if parameter is not None:
        found["dtype"] = str(parameter.dtype).removeprefix("torch.")
        found["device"] = str(parameter.device)
        if parameter.device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(parameter.device)
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
