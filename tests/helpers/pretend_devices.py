"""Devices that only pretend: tensors with real values on the CPU that claim to be on "cuda:0", "cuda:1", ….

As on real ones, an operation on tensors of different devices raises, so that a missing `.to(device)` shows on a machine
without any accelerator. A tensor of no dimensions may come from the CPU, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

KIND = "cuda"


class Pretender(Tensor):
    """A tensor that says it is on another device (PyTorch's C++ takes it for a meta tensor); `held` has its values."""

    held: Tensor
    claimed: torch.device

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Pretender:
        made = Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), dtype=real.dtype, device="meta")
        made.held, made.claimed = real, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.claimed

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def __repr__(self, **_: Any) -> str:
        return f"Pretender({self.device}, {self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # whose device C++ does not know
            args = (args[0], args[1].device, args[1].dtype)
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # lists among the indices would become meta tensors
            return _run(func, args, {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevices(TorchDispatchMode):
    """Makes `torch.arange(…, device="cuda:0")` and `.to("cuda:1")` work while it is open."""

    def __enter__(self) -> Any:
        self._lazy_init = torch.cuda._lazy_init
        torch.cuda._lazy_init = lambda: None
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda._lazy_init = self._lazy_init

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, form = tree_flatten((args, kwargs))
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "meta":
        asked = None  # C++ saying: like the tensor
    homes = {x.device for x in flat if isinstance(x, Pretender) or (isinstance(x, Tensor) and x.dim())}
    if len(homes) > 1 and asked is None and "copy_" not in str(func):
        raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, homes))}")
    home = torch.device(asked or next((x.device for x in flat if isinstance(x, Tensor)), "cpu"))
    if asked is None and len(homes) == 1:
        home = next(iter(homes))
    plain = [x.held if isinstance(x, Pretender) else x for x in flat]
    real_args, real_kwargs = tree_unflatten(plain, form)
    if real_kwargs.get("device") is not None:
        real_kwargs["device"] = torch.device("cpu")
    result = func(*real_args, **real_kwargs)
    # in place: give back the very tensor that was written to
    own = {id(x.held): x for x in flat if isinstance(x, Pretender)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or home.type != KIND:
            return value
        return own[id(value)] if id(value) in own else Pretender(value, home)

    return tree_map(wrap, result)


def pretend(module: nn.Module, device: str) -> None:
    """Move a module's parameters and buffers to a pretended device, in place."""
    place = torch.device(device)
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(Pretender(value.detach(), place), requires_grad=False)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = Pretender(value, place)
