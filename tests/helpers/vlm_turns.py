"""A later turn of a conversation with a vision-language model, and the definition of its pruning with masks.

The model runs on its own unpruned cache, and makes its own masks and positions. Hooks on the layers hide the positions
that a schedule has dropped, of this turn and of the one before, and pass the states of dropped positions through.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


def later(model: Any, first: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A second prompt as a turn after the first one.

    Models whose images have positions of several axes count them from the ids of a whole prompt, and cannot in a turn,
    so that they are given: those of the prompt alone, behind those of the first.
    """
    both = torch.cat((first["attention_mask"], inputs["attention_mask"]), 1)
    turn = {**inputs, "attention_mask": both}
    counts: Any = getattr(model.base_model, "get_rope_index", None)
    if counts is not None:
        names = inspect.signature(counts).parameters
        alone, own = (
            counts(**{key: value for key, value in one.items() if key in names})[0] for one in (first, inputs)
        )
        turn["position_ids"] = own + alone.amax() + 1
    return turn


@contextmanager
def thinned(decoder: Any, layer: int, present: Tensor) -> Iterator[None]:
    """A context in which positions that are not present take no part in `layer` and the layers after it.

    Args:
        decoder: the decoder.
        layer: see above.
        present: bool [batch, all positions so far], those of the turn last.
    """
    walk = _Turn(present)
    with ExitStack() as undo:
        for module in decoder.layers[layer:]:
            undo.callback(module.register_forward_pre_hook(partial(walk.before), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(walk.after).remove)
        yield


class _Turn:
    def __init__(self, present: Tensor) -> None:
        self.present, self.passed, self.given = present, None, None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        own = self.present[:, -hidden.shape[1] :]
        if self.passed is not None:  # features that are added between layers are for tokens that are there
            hidden = torch.where(own[..., None], hidden, self.passed)
        self.given = hidden
        mask, (new, every) = kwargs.get("attention_mask"), (hidden.shape[1], self.present.shape[1])
        if mask is None:
            mask = torch.ones(new, every, dtype=torch.bool).tril(every - new)[None, None]
        seen = self.present[:, None, None, -mask.shape[-1] :]  # a layer with a window may have forgotten the first
        itself = torch.zeros(new, mask.shape[-1], dtype=torch.bool)
        itself[torch.arange(new), mask.shape[-1] - new + torch.arange(new)] = True
        if mask.dtype == torch.bool:
            kwargs["attention_mask"] = (mask & seen) | itself
        else:
            hidden_keys = torch.finfo(mask.dtype).min
            kwargs["attention_mask"] = mask.masked_fill(~seen, hidden_keys).masked_fill(itself, 0)
        return (hidden, *args[1:]), kwargs

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        self.passed = torch.where(self.present[:, -first.shape[1] :, None], first, self.given)
        return (self.passed, *output[1:]) if isinstance(output, tuple) else self.passed
