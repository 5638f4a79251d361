"""Unwrapping of models from `torch.compile`, PEFT, data-parallel wrappers and pipelines."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tokenprune.errors import UnsupportedError


def unwrapped(model: Any) -> Any:
    """The model inside any number of wrappers; a model without wrappers is returned as it is.

    Supported are the results of `torch.compile`, `peft.PeftModel`, `torch.nn.DataParallel`, `DistributedDataParallel`
    and pipelines of transformers. The wrapper itself may be called in a pruning context.

    Raises:
        UnsupportedError: a wrapper that changes the model's input.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def uncompiled(thing: Any) -> Any:
    """The module inside the result of `torch.compile(module)`; anything else is returned as it is."""
    while _is_compiled(thing):
        thing = thing._orig_mod
    return thing


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model except wrappers of `torch.compile`, which have the attributes of the module inside."""
    compiled = _class("torch._dynamo.eval_frame", "OptimizedModule")  # looked up once, not for each module
    return [module for module in model.modules() if not isinstance(module, compiled)]


def outermost_module(model: Any, decoder: nn.Module) -> nn.Module:
    """The outermost module of a user's model, which may be an object that contains a module."""
    held = (uncompiled(part) for part in (model, getattr(model, "model", None), decoder))
    return next(part for part in held if isinstance(part, nn.Module))


def _is_compiled(thing: Any) -> bool:
    return _is(thing, "torch._dynamo.eval_frame", "OptimizedModule")


def _inside(model: Any) -> Any:
    if _is_compiled(model):
        return uncompiled(model)
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedError(
            f"DataParallel splits a batch over copies of the model on {len(model.device_ids)} devices, which is not "
            "supported; use one device (device_ids=[0]), or run one process for each device"
        )
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    if _is(model, "peft", "PeftModel"):
        config = model.active_peft_config
        if config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedError(
                f"the PEFT adapter is {kind}, which prepends virtual tokens to the prompt and so shifts the image "
                "tokens; use adapters inside the layers, such as LoRA"
            )
        return model.get_base_model()
    return model.model if _is(model, "transformers.pipelines.base", "Pipeline") else None


def _is(model: Any, module: str, name: str) -> bool:
    """True if it is an instance of a class that is not imported here: its package is optional or slow to import."""
    return isinstance(model, _class(module, name))


def _class(module: str, name: str) -> type | tuple[()]:
    """The class of that name; an empty tuple, for `isinstance`, if its module is not imported."""
    kind = getattr(sys.modules.get(module), name, ())
    return kind if isinstance(kind, type) else ()
