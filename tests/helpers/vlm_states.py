"""States of a vision tower, recorded from the untouched model: for tests of the adapter."""

from __future__ import annotations

import torch
from vlm_known import WITH_CLS, model_of
from vlm_watching import blocks_of, encoded


def states_of(name, inputs):
    """[P, C] each: what enters the tower's first layer, and what leaves every layer, without [CLS]."""
    model, blocks = model_of(name), blocks_of(model_of(name), inputs)
    found = [[] for _ in range(len(blocks) + 1)]

    def note(number, state):
        state = state if state.dim() == 3 else state[None]
        found[number].append(state[:, 1 if name in WITH_CLS else 0 :].flatten(0, 1))

    handles = [
        blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: note(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for number, block in enumerate(blocks, 1):
        handles.append(
            block.register_forward_hook(
                lambda module, args, out, number=number: note(number, out[0] if isinstance(out, tuple) else out)
            )
        )
    encoded(model, inputs)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]
