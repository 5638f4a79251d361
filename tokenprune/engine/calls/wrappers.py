"""Wrappers around models, and the models inside."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tokenprune.errors import UnsupportedError


def unwrapped(model: Any) -> Any:
    """The model inside wrappers, of which there may be several; one that is not wrapped is given back itself.

    Known are what `torch.compile` gives, `peft.PeftModel`, `torch.nn.DataParallel` and `DistributedDataParallel`, and
    pipelines of transformers. The wrapper itself may be called in a pruning context.

    Raises:
        UnsupportedError: a wrapper that gives the model another input than it was given.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def uncompiled(thing: Any) -> Any:
    """The module inside what `torch.compile(module)` gives; anything else is given back itself."""
    while _is_compiled(thing):
        thing = thing._orig_mod
    return thing


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model but the wrappers of `torch.compile`, which answer as what they hold does."""
    compiled = _class("torch._dynamo.eval_frame", "OptimizedModule")  # looked up once: every context walks a model
    return [module for module in model.modules() if not isinstance(module, compiled)]


def whole_module(model: Any, decoder: nn.Module) -> nn.Module:
    """The outermost module of what a user hands over, which may be no module but hold one."""
    held = (uncompiled(part) for part in (model, getattr(model, "model", None), decoder))
    return next(part for part in held if isinstance(part, nn.Module))


def _is_compiled(thing: Any) -> bool:
    return _is(thing, "torch._dynamo.eval_frame", "OptimizedModule")


def _inside(model: Any) -> Any:
    if _is_compiled(model):
        return uncompiled(model)
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedError(
            f"DataParallel splits a batch over copies of the model on {len(model.device_ids)} devices, which cannot be "
            "pruned as one; give it one device (device_ids=[0]), or run one process for each device"
        )
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    if _is(model, "peft", "PeftModel"):
        config = model.active_peft_config
        if config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedError(
                f"the PEFT adapter is {kind}, which puts virtual tokens before the prompt, so that image tokens stand "
                "elsewhere than the prompt says; prune a model with adapters in its layers, such as LoRA"
            )
        return model.get_base_model()
    return model.model if _is(model, "transformers.pipelines.base", "Pipeline") else None


def _is(model: Any, module: str, name: str) -> bool:
    """True if it is of this class, whose package may not be installed, or slow to import."""
    return isinstance(model, _class(module, name))


def _class(module: str, name: str) -> type | tuple[()]:
    """The class of that name, or what nothing is an instance of where its module is not imported."""
    kind = getattr(sys.modules.get(module), name, ())
    return kind if isinstance(kind, type) else ()
