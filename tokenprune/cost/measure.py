"""Counting the matmuls of code that really runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from tokenprune.core.decisions import Decision
    from tokenprune.core.stage import Shape, Stage
    from tokenprune.core.strategy import Strategy
    from tokenprune.core.tokens import Tokens


def flop_counter() -> FlopCounterMode:
    """`torch.utils.flop_counter.FlopCounterMode`, silent, with two entries of PyTorch's table put right.

    PyTorch's table lacks `_scaled_dot_product_flash_attention_for_cpu`, so that there SDPA counts as nothing; its
    other fused kernels, and eager attention, are counted. And outer products, which add nothing up, count as nothing:
    older releases of transformers make rotary tables by `bmm`, newer ones by elementwise multiplication.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_flop_count

    def batched_matmul(left: Any, right: Any, *_: Any, **__: Any) -> int:
        _, rows, inner = left
        return 0 if inner == 1 < rows else int(bmm_flop(left, right))

    def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    aten = torch.ops.aten
    own = {aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention, aten.bmm: batched_matmul}
    return FlopCounterMode(display=False, custom_mapping=own)


def measure_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs (2 per multiply-add) of one call, in the sense of the `exact` convention.

    Gradients are off, so that kernels are those of inference. Works on the meta device too, which costs no time: build
    the module and its inputs there.
    """
    import torch

    with torch.no_grad(), flop_counter() as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())


class ChoiceMeter:
    """Counts the matmuls inside a strategy's `choose`: similarities, merges, a projector run once more.

    The ledger accounts for attention rows only; what a strategy computes on its own can only be measured. Run
    `meter.strategy` in place of the strategy, and pass `fixed={"strategy": meter.flops}` to `count_flops`.

    Attributes:
        strategy: a copy to run, bound to the shape.
        flops: counted so far, over all stages and runs.
    """

    def __init__(self, strategy: Strategy, shape: Shape) -> None:
        bound = strategy.bind(shape)
        self.flops = 0
        self.strategy = copy.copy(bound)
        self._choose = bound.choose
        self.strategy.choose = self._metered  # type: ignore[method-assign]

    def _metered(self, stage: Stage, tokens: Tokens) -> Decision:
        with flop_counter() as counter:
            decision = self._choose(stage, tokens)
        self.flops += int(counter.get_total_flops())
        return decision
