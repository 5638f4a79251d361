"""How often the host waits for a (pretended) device, and where in the code."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretend_devices import KIND, Pretender
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
OURS = ("tokenprune", "strategies", "adapters")
VALUES = {  # the host needs the result, or the result's shape depends on values
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::isin",  # for many values
}


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a device; enter it within `PretendDevices`.

    Args:
        anywhere: whether tensors of the host count as if they were on a device.

    Attributes:
        found: how often each line of the package waited: "strategies/…/tome.py:103 aten::nonzero".
    """

    def __init__(self, anywhere: bool = False) -> None:
        super().__init__()
        self.anywhere = anywhere
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if _waits(name, args, kwargs or {}, Tensor if self.anywhere else Pretender):
            self.found[f"{_line()} {name}"] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._indexing = _Indexing(self).__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._indexing.__exit__(*error)

    def of(self, *folders: str) -> int:
        """The number of waits in the code of these folders of the repository."""
        return sum(number for line, number in self.found.items() if line.startswith(folders))

    def __str__(self) -> str:
        return "\n".join(f"{number:4} {line}" for line, number in self.found.most_common())


class _Indexing(TorchFunctionMode):
    """Counts `tensor[…]` with masks and with indices that are not on the device; `Pretender` does these itself."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretender):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waits.found.update([f"{_line()} [index]"] if any(map(_waits_as_index, index)) else [])
        return func(*args, **(kwargs or {}))


def _waits_as_index(part: Any) -> bool:
    if not isinstance(part, Tensor):
        return isinstance(part, (list, np.ndarray))
    return part.dtype == torch.bool or part.dim() == 0 or not isinstance(part, Pretender)


def _waits(name: str, args: Any, kwargs: dict[str, Any], kind: type[Tensor]) -> bool:
    there = any(isinstance(part, kind) for part in tree_leaves((args, kwargs)))
    if name in ("aten::_to_copy", "aten::copy_"):
        to = kwargs.get("device", args[0].device)
        start = args[-1] if name == "aten::copy_" else args[0]
        crosses = (to.type == KIND) != (start.device.type == KIND)
        # a copy to the device is only queued if it is asked not to block; a result of none is never waited for
        blocks = to.type != KIND or not (kwargs.get("non_blocking") or (name == "aten::copy_" and start.dim() == 0))
        return crosses and blocks
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return there and any(isinstance(part, Tensor) and part.dtype == torch.bool for part in args[1])
    return there and name in VALUES


def _line() -> str:
    """The innermost line of the package's own code, or of transformers', that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts:
            return f"{'/'.join(path.parts[path.parts.index('transformers') :])}:{frame.f_lineno}"
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS and path.name != "host_copies.py":
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
