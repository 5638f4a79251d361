"""Counts the matmuls of running code."""

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
    """`torch.utils.flop_counter.FlopCounterMode`, silent, with two corrected entries.

    PyTorch's table lacks `_scaled_dot_product_flash_attention_for_cpu`: SDPA on the CPU would count as 0. And outer
    products, which sum over nothing, count as 0: older releases of transformers compute rotary tables with `bmm`, newer
    ones with elementwise multiplication.
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

    Gradients are off: kernels are those of inference. Also works on the meta device, without any computation, if the
    module and its inputs are there.
    """
    import torch

    with torch.no_grad(), flop_counter() as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())


class ChoiceMeter:
    """Counts the matmuls inside a strategy's `choose`: similarities, merges, another run of the projector.

    The ledger counts only attention rows; a strategy's own computations have to be measured. Run
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
