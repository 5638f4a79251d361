"""Datasets: the protocol, and those that come with the package.

`tokenprune.datasets()` lists what is installed. Importing this package puts it in that function's place, so that it
can be called too.
Its names are imported on first use: the listing needs none of them.

Goes here: what a dataset is (`base`), how one is found and checked, and a folder for each bundled dataset, which
`plugin` registers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenprune.plugins import registry
from tokenprune.plugins.entries import Entry

if TYPE_CHECKING:
    from tokenprune.datasets.base import Dataset, Query, Scene

__all__ = ["Dataset", "Query", "Scene"]


class _CallableModule(ModuleType):
    def __call__(self) -> dict[str, Entry]:
        return registry.datasets()


sys.modules[__name__].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tokenprune.datasets import base

    return getattr(base, name)
