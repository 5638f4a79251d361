"""The definition of pruning on vision-language models, for tests of them: see `tokenprune.testing.oracle.masked`, and
`gathered_oracle` for decoders some of whose layers keep a state."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from gathered_oracle import gathered
from torch import Tensor

from tokenprune.core.layout import SequenceLayout
from tokenprune.testing.oracle import masked
from tokenprune.testing.scripted import Scripted

STATES = {"linear_attention", "conv"}


def attends(decoder: Any) -> list[bool]:
    """For each layer, whether it attends to the sequence; the others keep a state."""
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    return [kind not in STATES for kind in types]


def oracle(decoder: Any, layout: SequenceLayout, script: Scripted) -> AbstractContextManager[None]:
    """A context in which calls without cache compute the oracle of a script."""
    return (masked if all(attends(decoder)) else gathered)(decoder, layout, script)


def grown(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Inputs with the tokens `new`, int64 [batch, n], behind them, all of them text."""
    text = dict.fromkeys(("mm_token_type_ids", "moe_mm_token_type_ids"), torch.zeros_like(new))
    fills = {"input_ids": new, "attention_mask": torch.ones_like(new), **text}
    if "token_type_ids" in inputs:  # PaliGemma: the suffix is 1, the prefix 0; Gemma 3: text is 0
        prefix = bool((inputs["token_type_ids"] == 0).all())
        fills["token_type_ids"] = torch.full_like(new, int(prefix))
    return {
        name: torch.cat((value, fills[name].to(value.dtype)), 1) if name in fills else value
        for name, value in inputs.items()
    }
