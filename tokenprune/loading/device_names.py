"""Checks of the names of devices and dtypes, without importing torch."""

from __future__ import annotations

import re
from importlib import metadata

from tokenprune.errors import OptionError, nearest

DTYPES = ("float32", "bfloat16", "float16")  # of weights
# torch's own; packages with others use its entry-point group
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "xla", "ipu", "vulkan", "meta", "privateuseone")
ADDED = "torch.backends"


def check_device(device: str) -> None:
    """Raises OptionError for an unknown device name; whether the device is available only torch can check."""
    found = re.fullmatch(r"([a-z]+)(:\d+)?", device)
    if found is None or (found[1] not in DEVICES and not metadata.entry_points(group=ADDED)):
        raise unknown_device(device)


def unknown_device(device: str) -> OptionError:
    """The error for an unknown device name."""
    near = nearest(device.partition(":")[0], ("cpu", "cuda", "mps", "xpu"), limit=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return OptionError(f"device {device!r} is unknown; {hint}expected e.g. 'cpu', 'cuda' or 'cuda:1'")


def check_dtype(dtype: str) -> None:
    """Raises OptionError for an unknown dtype of weights."""
    if dtype.removeprefix("torch.") not in DTYPES:
        raise OptionError(f"dtype {dtype!r} found, expected one of {', '.join(DTYPES)}")
