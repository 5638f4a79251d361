"""Visual-token pruning for large vision-language models: comparable, reusable, fast.

Public names are imported on first use, so that `import tokenprune` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter as Adapter
    from tokenprune.api import load as load
    from tokenprune.api import strategy as strategy
    from tokenprune.errors import TokenPruneError as TokenPruneError
    from tokenprune.hookspecs import hookimpl as hookimpl
    from tokenprune.registry import adapters as adapters
    from tokenprune.registry import datasets as datasets
    from tokenprune.registry import models as models
    from tokenprune.registry import strategies as strategies

__version__ = "0.1.0"

_HOME = {
    "tokenprune.adapter": ("Adapter",),
    "tokenprune.api": ("load", "strategy"),
    "tokenprune.base": ("Shape", "Stage", "Strategy", "StrategyOptions"),
    "tokenprune.decisions": ("Drop", "Keep", "Merge", "Park", "Restore"),
    "tokenprune.engine": ("prune",),
    "tokenprune.errors": ("TokenPruneError",),
    "tokenprune.evaluation.compare": ("compare",),
    "tokenprune.hookspecs": ("hookimpl",),
    "tokenprune.reads": ("AttentionFrom",),
    "tokenprune.registry": ("adapters", "datasets", "models", "strategies"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
