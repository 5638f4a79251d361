"""Data sets, and `tokenprune.datasets()`, the function that lists those installed.

The package and the function share a name: importing the package puts it in the function's place, so it can be called too.
"""

from __future__ import annotations

import sys
from types import ModuleType

from tokenprune import registry
from tokenprune.plugins import Entry


class _CallableModule(ModuleType):
    def __call__(self) -> dict[str, Entry]:
        return registry.datasets()


sys.modules[__name__].__class__ = _CallableModule
