"""Bytes of the KV cache after a prefill."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.core.ledger import Ledger
from tokenprune.cost.spec import DecoderSpec
from tokenprune.errors import InputError

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KVBytes:
    """Keys and values of real tokens, in bytes.

    Attributes:
        by_layer: per decoder layer, per batch row.
    """

    by_layer: tuple[tuple[int, ...], ...]

    @property
    def by_row(self) -> tuple[int, ...]:
        """Per batch row, over all layers."""
        return tuple(sum(row) for row in zip(*self.by_layer, strict=True))

    @property
    def total(self) -> int:
        """All rows and layers."""
        return sum(self.by_row)


def kv_bytes(ledger: Ledger, spec: DecoderSpec, element_bytes: int = 2) -> KVBytes:
    """KV-cache bytes per layer and row: 2 · kv_heads · head_dim · real tokens in its cache · bytes per element.

    Padding and the filling of shorter rows are not counted.

    Raises:
        InputError: the ledger and the spec disagree on the number of layers.
    """
    if len(ledger.entries) != spec.layers:
        raise InputError(
            f"ledger: {len(ledger.entries)} layers found, expected {spec.layers} as in the decoder's sizes"
        )
    token = 2 * spec.kv_heads * spec.head_dim * element_bytes
    return KVBytes(
        tuple(
            tuple(token * (image + other) for image, other in zip(entry.in_cache, entry.other, strict=True))
            for entry in ledger.entries
        )
    )
