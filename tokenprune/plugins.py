"""What a plugin registers: entries with a lazy target, where they come from, and how they are collected."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy

from tokenprune.errors import PluginError


@dataclass(frozen=True)
class Kind:
    """One kind of thing that plugins register."""

    noun: str
    hook: str


KINDS = {
    "strategies": Kind("strategy", "tokenprune_register_strategies"),
    "adapters": Kind("adapter", "tokenprune_register_adapters"),
    "datasets": Kind("data set", "tokenprune_register_datasets"),
    "models": Kind("model", "tokenprune_register_models"),
}


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from."""

    plugin: str
    distribution: str
    version: str

    @property
    def key(self) -> str:
        """The plugin's name in the pluggy manager: unique over all packages."""
        return f"{self.distribution}:{self.plugin}"

    @classmethod
    def of(cls, point: metadata.EntryPoint) -> Source:
        """The source that an entry point belongs to."""
        dist = getattr(point, "dist", None)
        return cls(point.name, dist.name if dist else "unknown", dist.version if dist else "")


@dataclass(frozen=True)
class Entry:
    """One registered thing; `load()` imports it."""

    name: str
    kind: str
    summary: str
    source: Source
    target: Any

    @property
    def distribution(self) -> str:
        """Name of the package that brings it (or of the plugin, when it was added in process)."""
        return self.source.distribution

    @property
    def version(self) -> str:
        """Version of that package; empty when it was added in process."""
        return self.source.version

    def load(self) -> Any:
        """The class or function itself.

        Raises:
            PluginError: it cannot be imported; names the plugin, its package and the cause.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            problem = f"{KINDS[self.kind].noun} {self.name!r} ({self.target}) cannot be imported: {first_line(error)}"
            raise PluginError.of(
                self.source.plugin, self.distribution, problem, "reinstall or fix the package"
            ) from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that was set aside because it could not be imported or registered."""

    name: str
    distribution: str
    version: str
    error: str


def collect(manager: pluggy.PluginManager, plugin: Any, source: Source) -> list[Entry]:
    """Call the registration hooks of one plugin.

    Raises:
        PluginError: a name or target that cannot be registered, or a name that this plugin registers twice.
        Exception: whatever the plugin raises.
    """
    others = [other for other in manager.get_plugins() if other is not plugin]
    found: dict[tuple[str, str], Entry] = {}
    for kind, (noun, hook) in ((key, (value.noun, value.hook)) for key, value in KINDS.items()):

        def register(name: str, target: Any, summary: str = "", kind: str = kind, noun: str = noun) -> None:
            _check(source, noun, name, target)
            if (kind, name) in found:
                raise PluginError.of(source.plugin, source.distribution, f"it registers the {noun} {name!r} twice")
            found[kind, name] = Entry(name, kind, summary, source, target)

        manager.subset_hook_caller(hook, others)(register=register)
    return list(found.values())


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _check(source: Source, noun: str, name: Any, target: Any) -> None:
    if not isinstance(name, str) or not name or name.split() != [name]:
        problem = f"found {name!r} as the name of a {noun}, expected a word without white space"
        raise PluginError.of(source.plugin, source.distribution, problem)
    if isinstance(target, str):
        module, colon, attribute = target.partition(":")
        valid = bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
    else:
        valid = callable(target)
    if not valid:
        problem = f'found {target!r} as the target of the {noun} {name!r}, expected a class or "module:attribute"'
        raise PluginError.of(source.plugin, source.distribution, problem)
