"""Visual-token pruning for large vision-language models: comparable, reusable, fast.

Public names are imported on first use, so that `import tokenprune` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.api import load, strategy
    from tokenprune.core.composition.sequence import Sequence
    from tokenprune.core.decisions import Decision, Keep, Merge, MergeGroup, Restore
    from tokenprune.core.reads import (
        AttentionFrom,
        ClipImageEmbeddings,
        ClipTextEmbeddings,
        ClsAttention,
        ClsFeatures,
        ClsQuery,
        Crops,
        Embeddings,
        HiddenStates,
        LayerKeys,
        Pixels,
        PositionKernel,
        Projector,
        Read,
        ReceivedAttention,
        TextEmbeddings,
        TextKeys,
        TextStates,
        TowerFeatures,
        TowerKeys,
        TowerValues,
    )
    from tokenprune.core.scorer import ScorerStrategy
    from tokenprune.core.stage import Shape, Stage
    from tokenprune.core.strategy import Strategy, StrategyOptions
    from tokenprune.core.tokens import Tokens
    from tokenprune.engine import prune
    from tokenprune.engine.interface.compatibility import Compatibility, compatible
    from tokenprune.errors import TokenPruneError
    from tokenprune.evaluation.compare import compare
    from tokenprune.loading.adapter import Adapter
    from tokenprune.plugins.hookspecs import hookimpl
    from tokenprune.plugins.registry import adapters, datasets, models, strategies

__version__ = "0.1.0"

_HOME = {
    "tokenprune.loading.adapter": ("Adapter",),
    "tokenprune.api": ("load", "strategy"),
    "tokenprune.core.scorer": ("ScorerStrategy",),
    "tokenprune.core.stage": ("Shape", "Stage"),
    "tokenprune.core.strategy": ("Strategy", "StrategyOptions"),
    "tokenprune.engine.interface.compatibility": ("Compatibility", "compatible"),
    "tokenprune.core.decisions": ("Decision", "Keep", "Merge", "MergeGroup", "Restore"),
    "tokenprune.core.tokens": ("Tokens",),
    "tokenprune.engine": ("prune",),
    "tokenprune.errors": ("TokenPruneError",),
    "tokenprune.evaluation.compare": ("compare",),
    "tokenprune.plugins.hookspecs": ("hookimpl",),
    "tokenprune.core.reads": (
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
        "Pixels",
        "PositionKernel",
        "Projector",
        "Read",
        "ReceivedAttention",
        "TextEmbeddings",
        "TextKeys",
        "TextStates",
        "TowerFeatures",
        "TowerKeys",
        "TowerValues",
    ),
    "tokenprune.plugins.registry": ("adapters", "datasets", "models", "strategies"),
    "tokenprune.core.composition.sequence": ("Sequence",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Adapter",
    "AttentionFrom",
    "ClipImageEmbeddings",
    "ClipTextEmbeddings",
    "ClsAttention",
    "ClsFeatures",
    "ClsQuery",
    "Compatibility",
    "Crops",
    "Decision",
    "Embeddings",
    "HiddenStates",
    "Keep",
    "LayerKeys",
    "Merge",
    "MergeGroup",
    "Pixels",
    "PositionKernel",
    "Projector",
    "Read",
    "ReceivedAttention",
    "Restore",
    "ScorerStrategy",
    "Sequence",
    "Shape",
    "Stage",
    "Strategy",
    "StrategyOptions",
    "TextEmbeddings",
    "TextKeys",
    "TextStates",
    "TokenPruneError",
    "Tokens",
    "TowerFeatures",
    "TowerKeys",
    "TowerValues",
    "adapters",
    "compare",
    "compatible",
    "datasets",
    "hookimpl",
    "load",
    "models",
    "prune",
    "strategies",
    "strategy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
