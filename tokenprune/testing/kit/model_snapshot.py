"""Everything on a model that a run may change, to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Hooks, attributes, configurations, training flags and parameters of every module, by "module: what"."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        where = name or type(module).__name__
        for kind in _HOOKS:
            found[f"{where}: {kind}"] = tuple(getattr(module, kind, ()))
        found[f"{where}: attributes"] = tuple(sorted(module.__dict__))
        found[f"{where}: forward"] = getattr(module.__dict__.get("forward"), "__name__", None)
        config = module.__dict__.get("config")
        found[f"{where}: config"] = id(config), getattr(config, "_attn_implementation", None)
        found[f"{where}: training"] = module.training
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}: values"] = id(parameter), parameter.requires_grad, float(parameter.detach().double().sum())
    found["torch: default type"] = torch.get_default_dtype()
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what has changed."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
