"""What a stage can read. A stage declares the reads that it requires; the model declares those that it provides.

Belongs here: one class per kind of read. `decoder` has those that the engine provides for any decoder, `vision` those
that adapters provide, `prior` a stored map, `own` the base of those that a plugin defines.

Examples:
    A read with options is an object with arguments; its value is an attribute of `Tokens`, here `tokens.attention`:

    >>> import tokenprune as tp
    >>> tp.Stage("prune", layer=2, tokens=64, reads=(tp.AttentionFrom("last", reduce="max"),)).reads[0].field
    'attention'
"""

from __future__ import annotations

from tokenprune.core.reads.base import Read
from tokenprune.core.reads.decoder import (
    AttentionFrom,
    Embeddings,
    HiddenStates,
    LayerKeys,
    LayerValues,
    PositionKernel,
    RotaryTables,
    TextEmbeddings,
    TextKeys,
    TextStates,
    TextValues,
)
from tokenprune.core.reads.own import LayerRead, LayerView
from tokenprune.core.reads.prior import PositionPrior
from tokenprune.core.reads.vision import (
    ClipImageEmbeddings,
    ClipTextEmbeddings,
    ClsAttention,
    ClsFeatures,
    ClsQuery,
    Crops,
    Pixels,
    Projector,
    ReceivedAttention,
    TowerFeatures,
    TowerKeys,
    TowerStates,
    TowerValues,
)

__all__ = [
    "AttentionFrom",
    "ClipImageEmbeddings",
    "ClipTextEmbeddings",
    "ClsAttention",
    "ClsFeatures",
    "ClsQuery",
    "Crops",
    "Embeddings",
    "HiddenStates",
    "LayerKeys",
    "LayerRead",
    "LayerValues",
    "LayerView",
    "Pixels",
    "PositionKernel",
    "PositionPrior",
    "Projector",
    "Read",
    "ReceivedAttention",
    "RotaryTables",
    "TextEmbeddings",
    "TextKeys",
    "TextStates",
    "TextValues",
    "TowerFeatures",
    "TowerKeys",
    "TowerStates",
    "TowerValues",
]
