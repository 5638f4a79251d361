"""Everything on a model that a run may touch."""

from __future__ import annotations


def state(model):
    """Everything a run may touch: hooks, attributes, configs, training flags."""
    return [
        (
            name,
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._backward_hooks),
            sorted(module.__dict__),
            id(module.__dict__.get("config")),
            module.training,
            getattr(module.__dict__.get("config"), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
