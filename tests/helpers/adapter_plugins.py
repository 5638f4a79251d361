"""Adapters of tests, and a plugin that registers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune import Adapter, hookimpl


class LoadsNothing(Adapter):
    """Matches no checkpoint."""

    @classmethod
    def matches(cls, source: str, config: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        raise AssertionError("nothing matches")


class AdapterPlugin:
    """Registers adapters in the given order."""

    def __init__(self, **adapters: Any) -> None:
        self.adapters = adapters

    @hookimpl
    def tokenprune_register_adapters(self, register: Any) -> None:
        for name, adapter in self.adapters.items():
            register(name, adapter, summary="of this test")
