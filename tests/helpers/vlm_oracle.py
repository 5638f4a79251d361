"""The definition of pruning on vision-language models, for tests of them: see `tokenprune.testing.oracle.masked`."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.testing.oracle import masked as oracle

__all__ = ["grown", "oracle"]


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
