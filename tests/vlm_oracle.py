"""The definition of pruning on a real vision-language model, by hooks on its decoder layers and full-length masks.

In layer l, positions that are not active are hidden as keys and their hidden states pass through unchanged. Nothing
here uses the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.layout import SequenceLayout
from tokenprune.testing.oracle import apply_decision
from tokenprune.testing.scripts import Scripted


class Oracle:
    """The masked full-length computation of a script on a decoder.

    Attributes:
        present: bool [batch, sequence], what takes part in the layer that runs.
    """

    def __init__(self, layout: SequenceLayout, script: Scripted) -> None:
        self.layout, self.script = layout, script
        self.present = layout.valid.clone()
        self.alive = {"active": layout.image_tokens.clone()}
        self._before: Tensor
        self._after: Tensor | None = None
        self._ran: Tensor

    def before(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if self._after is not None:  # what the decoder adds between layers (DeepStack) is for active positions only
            hidden = torch.where(self._ran[..., None], hidden, self._after)
        for step in self.script.steps:
            if step.layer == number:
                hidden = apply_decision(step.decision, hidden, self.layout, self.alive)
                self.present = (self.layout.valid & ~self.layout.image_tokens) | self.alive["active"]
        self._before, self._ran = hidden, self.present
        mask = self._mask(kwargs.get("attention_mask"), hidden)
        return (hidden, *args[1:]), {**kwargs, "attention_mask": mask}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        self._after = torch.where(self._ran[..., None], first, self._before)
        return (self._after, *output[1:]) if isinstance(output, tuple) else self._after

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        if mask is None:  # transformers' way to say plain causal
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        seen = self._ran[:, None, None, :]
        itself = torch.eye(length, dtype=torch.bool)  # hidden positions see themselves: their output is thrown away
        if mask.dtype == torch.bool:
            return (mask & seen) | itself
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).masked_fill(itself, 0)


@contextmanager
def oracle(decoder: Any, layout: SequenceLayout, script: Scripted) -> Iterator[Oracle]:
    """While open, one forward without cache of the model around `decoder` computes the definition of `script`."""
    made = Oracle(layout, script)
    with ExitStack() as undo:
        for number, layer in enumerate(decoder.layers):
            undo.callback(layer.register_forward_pre_hook(partial(made.before, number), with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(made.after).remove)
        yield made


def grown(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Inputs with the tokens `new`, int64 [batch, n], behind them, all of them text."""
    fills = {"input_ids": new, "attention_mask": torch.ones_like(new), "mm_token_type_ids": torch.zeros_like(new)}
    if "token_type_ids" in inputs:  # PaliGemma: the suffix is 1, the prefix 0; Gemma 3: text is 0
        prefix = bool((inputs["token_type_ids"] == 0).all())
        fills["token_type_ids"] = torch.full_like(new, int(prefix))
    return {
        name: torch.cat((value, fills[name].to(value.dtype)), 1) if name in fills else value
        for name, value in inputs.items()
    }
