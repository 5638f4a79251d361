"""What a run costs: FLOPs in three conventions and KV-cache bytes, computed from a ledger and a decoder's sizes.

Goes here: formulas over counts, and what measures a strategy's own arithmetic. Another convention for FLOPs is added to
`flops`, sizes of another kind of decoder to `spec`. Times are measured in `evaluation/`.
"""

from __future__ import annotations

from tokenprune.cost.flops import CONVENTIONS, Convention, Flops, count_flops
from tokenprune.cost.measure import ChoiceMeter, flop_counter, measure_flops
from tokenprune.cost.memory import ELEMENT_BYTES, KVBytes, kv_bytes
from tokenprune.cost.spec import DecoderSpec

__all__ = [
    "CONVENTIONS",
    "ELEMENT_BYTES",
    "ChoiceMeter",
    "Convention",
    "DecoderSpec",
    "Flops",
    "KVBytes",
    "count_flops",
    "flop_counter",
    "kv_bytes",
    "measure_flops",
]
