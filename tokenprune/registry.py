"""Names of strategies, adapters, data sets and bundled models, collected from plugins and imported on first use.

Plugins come from the entry-point group `tokenprune` and from `register_plugin`. The scan happens on first use and
imports only the plugins' registration modules. A plugin that fails there is set aside with its error
(`broken_plugins()`), and all others work. Two packages that register one name are an error that names both.
"""

from __future__ import annotations

import threading
from importlib import metadata
from typing import Any

import pluggy

from tokenprune import hookspecs
from tokenprune.errors import PluginError, UnknownNameError
from tokenprune.plugins import KINDS, BrokenPlugin, Entry, Source, collect, first_line


class Registry:
    """One scan of the installed plugins, kept until `reset()`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._in_process: list[tuple[Any, Source]] = []
        self._clear()

    def _clear(self) -> None:
        self._manager: pluggy.PluginManager | None = None
        self._sources: dict[str, Source] = {}
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self._collisions: list[str] = []
        self._broken: list[BrokenPlugin] = []

    def reset(self) -> None:
        """Forget the scan and every plugin that was added in process; the next use scans again."""
        with self._lock:
            self._in_process = []
            self._clear()

    def register_plugin(self, plugin: Any, name: str) -> None:
        """Add a plugin of this process, without a package.

        Args:
            plugin: a module or object with `@tokenprune.hookimpl` methods.
            name: how messages and `tokenprune list` call it.

        Raises:
            PluginError: it cannot be registered, or one of its names is taken; nothing of it stays registered.
        """
        source = Source(plugin=name, distribution=name, version="")
        with self._lock:
            self._scan()
            if source.key in self._sources:
                raise PluginError.of(name, name, "a plugin of this name is registered already", "choose another name")
            try:
                self._add(plugin, source)
            except PluginError:
                raise
            except Exception as error:
                raise PluginError.of(name, name, f"registration failed with {first_line(error)}") from error
            if self._collisions:
                problem = self._collisions.pop()
                self._remove(source)
                raise PluginError(problem)
            self._in_process.append((plugin, source))

    def unregister_plugin(self, name: str) -> None:
        """Remove a plugin that `register_plugin` added.

        Raises:
            UnknownNameError: no such plugin.
        """
        with self._lock:
            for position, (_, source) in enumerate(self._in_process):
                if source.plugin == name:
                    self._remove(source)
                    del self._in_process[position]
                    return
            raise UnknownNameError.among("plugin of this process", name, [s.plugin for _, s in self._in_process])

    def plugin_manager(self) -> pluggy.PluginManager:
        """The pluggy manager with every working plugin registered."""
        with self._lock:
            self._scan()
            assert self._manager is not None
            return self._manager

    def entries(self, kind: str) -> dict[str, Entry]:
        """All registered things of one kind, by name, in the order of their packages.

        Raises:
            PluginError: two packages register one name.
        """
        with self._lock:
            self._scan()
            if self._collisions:
                raise PluginError("; ".join(self._collisions))
            return dict(self._entries[kind])

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UnknownNameError: nobody registered it; the message suggests the nearest names.
            PluginError: two packages register one name.
        """
        known = self.entries(kind)
        if name not in known:
            raise UnknownNameError.among(KINDS[kind].noun, name, known)
        return known[name]

    def broken_plugins(self) -> list[BrokenPlugin]:
        """Plugins that were set aside, with their errors."""
        with self._lock:
            self._scan()
            return list(self._broken)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a lifecycle hook of every observer, e.g. `notify("tokenprune_prefill_done", run=run)`.

        Raises:
            PluginError: an observer raised; names the plugin and its package.
        """
        manager = self.plugin_manager()
        implementations = getattr(manager.hook, hook).get_hookimpls()
        for plugin in [implementation.plugin for implementation in reversed(implementations)]:
            others = [other for other in manager.get_plugins() if other is not plugin]
            try:
                manager.subset_hook_caller(hook, others)(**arguments)
            except Exception as error:
                source = self._sources[str(manager.get_name(plugin))]
                problem = f"its hook {hook} failed with {first_line(error)}"
                raise PluginError.of(source.plugin, source.distribution, problem, "fix or uninstall it") from error

    def _scan(self) -> None:
        if self._manager is not None:
            return
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        points = metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)
        for point in sorted(points, key=lambda p: (Source.of(p).distribution != "tokenprune", Source.of(p).key)):
            source = Source.of(point)
            try:
                self._add(point.load(), source)
            except (Exception, SystemExit) as error:
                self._broken.append(BrokenPlugin(source.plugin, source.distribution, source.version, first_line(error)))

    def _add(self, plugin: Any, source: Source) -> None:
        assert self._manager is not None
        self._manager.register(plugin, name=source.key)
        self._sources[source.key] = source
        try:
            found = collect(self._manager, plugin, source)
        except BaseException:
            self._remove(source)
            raise
        for entry in found:
            taken = self._entries[entry.kind].setdefault(entry.name, entry)
            if taken is not entry:
                self._collisions.append(
                    f"{KINDS[entry.kind].noun} {entry.name!r} is registered by two packages, "
                    f"{taken.distribution!r} and {entry.distribution!r}; uninstall one of them"
                )

    def _remove(self, source: Source) -> None:
        assert self._manager is not None
        self._manager.unregister(name=source.key)
        del self._sources[source.key]
        for kind, entries in self._entries.items():
            self._entries[kind] = {name: entry for name, entry in entries.items() if entry.source != source}


class Observers:
    """The lifecycle hooks of all plugins. An observer that raises is named in a PluginError."""

    def tokenprune_run_started(self, *, run: Any) -> None:
        """See `tokenprune.hookspecs`."""
        _registry.notify("tokenprune_run_started", run=run)

    def tokenprune_stage_entered(self, *, run: Any, stage: Any, decision: Any) -> None:
        """See `tokenprune.hookspecs`."""
        _registry.notify("tokenprune_stage_entered", run=run, stage=stage, decision=decision)

    def tokenprune_prefill_done(self, *, run: Any) -> None:
        """See `tokenprune.hookspecs`."""
        _registry.notify("tokenprune_prefill_done", run=run)

    def tokenprune_run_finished(self, *, run: Any) -> None:
        """See `tokenprune.hookspecs`."""
        _registry.notify("tokenprune_run_finished", run=run)


_registry = Registry()
observers = Observers()
reset = _registry.reset
register_plugin = _registry.register_plugin
unregister_plugin = _registry.unregister_plugin
plugin_manager = _registry.plugin_manager
broken_plugins = _registry.broken_plugins
get = _registry.get
entries = _registry.entries


def strategies() -> dict[str, Entry]:
    """The pruning strategies that are installed: name -> description."""
    return _registry.entries("strategies")


def adapters() -> dict[str, Entry]:
    """The model adapters that are installed: name -> description."""
    return _registry.entries("adapters")


def datasets() -> dict[str, Entry]:
    """The data sets that are installed: name -> description."""
    return _registry.entries("datasets")


def models() -> dict[str, Entry]:
    """The models that installed packages bring along: name -> description."""
    return _registry.entries("models")
