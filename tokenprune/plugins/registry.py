"""Names of strategies, adapters, datasets and everything else that plugins register, imported on first use.

Plugins come from the entry-point group `tokenprune` and from `register_plugin`. The first use scans them, which imports
their registration modules only. A plugin that fails there is listed in `broken_plugins()`; all others work. A name that
two packages register is an error when it is used. TOKENPRUNE_PLUGINS=a,b loads only those and the built-in plugins.

The methods of one `Registry` are the functions of this module: `registry.plugins()`, `registry.register_plugin(…)`.

Examples:
    >>> import tokenprune as tp
    >>> tp.strategies()["fastv"].target, "lisa" in tp.adapters(), "shapes" in tp.datasets(), "lisa-tiny" in tp.models()
    ('tokenprune_strategies.fastv:FastV', True, True, True)
"""

from __future__ import annotations

import sys
import threading
from contextlib import redirect_stdout
from importlib import metadata
from typing import Any

import pluggy

from tokenprune.errors import PluginError, UnknownNameError
from tokenprune.plugins import hookspecs
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import (
    KINDS,
    LIMIT,
    OWN,
    BrokenPlugin,
    Entry,
    PluginStatus,
    Source,
    chosen_plugins,
    collect,
    collision,
    is_chosen,
    missing,
    not_loaded,
)
from tokenprune.plugins.validation import api_of, check_plugin, register


class Registry:
    """The installed plugins, scanned once and kept until `reset()`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._in_process: list[tuple[Any, Source]] = []
        self._scanning = False
        self._clear()

    def _clear(self) -> None:
        self._manager: pluggy.PluginManager | None = None
        self._sources: dict[str, Source] = {}
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self._contested: dict[tuple[str, str], list[Entry]] = {}
        self._broken: list[BrokenPlugin] = []
        self._left_out: list[Source] = []

    def reset(self) -> None:
        """Forget all plugins, those added in process included; the next use scans again.

        Raises PluginError if a plugin calls it while plugins are being loaded.
        """
        with self._lock:
            if self._scanning:
                raise PluginError("registry.reset() was called while plugins are being loaded; call it afterwards")
            self._in_process = []
            self._clear()

    def register_plugin(self, plugin: Any, name: str) -> None:
        """Add a plugin in this process, without a package.

        Args:
            plugin: a module or object with `@tokenprune.hookimpl` methods.
            name: of the plugin, for messages and `tokenprune list`.

        Raises:
            PluginError: it cannot be registered, or one of its names is taken; then nothing of it is registered.
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
                raise PluginError.of(name, name, f"registration failed with {brief(error)}") from error
            contested = [found for found in self._contested.items() if any(e.source == source for e in found[1])]
            if contested:
                self._remove(source)
                raise PluginError(collision(contested[0][1]))
            self._in_process.append((plugin, source))

    def unregister_plugin(self, name: str) -> None:
        """Remove a plugin that was added with `register_plugin`.

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
        """All entries of one kind, by name, by package; names that two packages register are left out (see `get`)."""
        with self._lock:
            self._scan()
            return {name: entry for name, entry in self._entries[kind].items() if (kind, name) not in self._contested}

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UnknownNameError: it is not registered; the message suggests similar names.
            PluginError: two packages register the name.
        """
        known = self.entries(kind)
        if (kind, name) in self._contested:
            raise PluginError(collision(self._contested[kind, name]))
        if name not in known:
            error = UnknownNameError.among(KINDS[kind].noun, name, known)
            raise UnknownNameError(f"{error}{not_loaded(self._broken)}")
        return known[name]

    def collisions(self) -> list[str]:
        """A message for each name that two packages register."""
        with self._lock:
            self._scan()
            return [collision(entries) for entries in self._contested.values()]

    def plugins(self) -> list[PluginStatus]:
        """Every plugin, working or not: built-in, installed, and added in this process."""
        with self._lock:
            self._scan()
            assert self._manager is not None
            found = [self._status(source) for source in self._sources.values()]
            for broken in self._broken:
                where = ("built-in" if broken.distribution == OWN else "installed", "broken", broken.error)
                found.append(PluginStatus(broken.name, broken.distribution, broken.version, *where))
            for source in self._left_out:
                reason = f"{LIMIT} does not name {source.plugin!r}"
                found.append(
                    PluginStatus(source.plugin, source.distribution, source.version, "installed", "left out", reason)
                )
            return found

    def _status(self, source: Source) -> PluginStatus:
        assert self._manager is not None
        registers: dict[str, list[str]] = {}
        for kind, entries in self._entries.items():
            names = [name for name, entry in entries.items() if entry.source == source]
            if names:
                registers[kind] = names
        taken = [collision(entries) for entries in self._contested.values() if source in [e.source for e in entries]]
        mine = any(source == other for _, other in self._in_process)
        return PluginStatus(
            name=source.plugin,
            distribution=source.distribution,
            version=source.version,
            origin="this process" if mine else "built-in" if source.distribution == OWN else "installed",
            status="collides" if taken else "works",
            error="; ".join(taken),
            hook_api=api_of(self._manager.get_plugin(source.key)),
            registers=registers,
        )

    def broken_plugins(self) -> list[BrokenPlugin]:
        """Plugins that could not be loaded, with their errors."""
        with self._lock:
            self._scan()
            return list(self._broken)

    def source_of(self, plugin: Any) -> Source:
        """Where a registered plugin comes from."""
        return self._sources[str(self.plugin_manager().get_name(plugin))]

    def _scan(self) -> None:
        if self._manager is not None:
            return
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        points = metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)
        chosen = chosen_plugins()
        self._scanning = True
        try:
            for point in sorted(points, key=lambda p: (Source.of(p).distribution != OWN, Source.of(p).key)):
                source = Source.of(point)
                if is_chosen(source, chosen):
                    self._load(point, source)
                else:
                    self._left_out.append(source)
        except BaseException:  # such as an interrupt: the next use scans again
            self._clear()
            raise
        finally:
            self._scanning = False
        self._broken.extend(missing(chosen, [Source.of(point) for point in points]))

    def _load(self, point: metadata.EntryPoint, source: Source) -> None:
        try:
            if point.pattern.match(point.value) is None:
                problem = f'its entry point is {point.value!r}, expected "module" or "module:attribute"'
                raise PluginError.of(source.plugin, source.distribution, problem)
            with redirect_stdout(sys.stderr):  # keep what a plugin prints out of a command's output
                self._add(point.load(), source)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # pytest.skip raises a BaseException
            self._broken.append(
                BrokenPlugin(source.plugin, source.distribution, source.version, _message(error, source))
            )

    def _add(self, plugin: Any, source: Source) -> None:
        assert self._manager is not None
        if source.key in self._sources:
            problem = "the package has two entry points of this name; the first is used"
            raise PluginError.of(source.plugin, source.distribution, problem, "rename one of them")
        self._sources[source.key] = source
        try:
            register(self._manager, plugin, source)
            check_plugin(self._manager, plugin, source)
            found = collect(self._manager, plugin, source)
        except BaseException:
            self._remove(source)
            raise
        for entry in found:
            taken = self._entries[entry.kind].setdefault(entry.name, entry)
            if taken is not entry:
                self._contested.setdefault((entry.kind, entry.name), [taken]).append(entry)

    def _remove(self, source: Source) -> None:
        assert self._manager is not None
        self._manager.unregister(name=source.key)
        del self._sources[source.key]
        for kind, entries in self._entries.items():
            self._entries[kind] = {name: entry for name, entry in entries.items() if entry.source != source}
        for key, contenders in list(self._contested.items()):
            left = [entry for entry in contenders if entry.source != source]
            self._contested[key] = left
            if len(left) < 2:
                del self._contested[key]


def _message(error: BaseException, source: Source) -> str:
    if isinstance(error, PluginError) and error.plugin:
        return str(error)
    return str(PluginError.of(source.plugin, source.distribution, f"it cannot be loaded: {brief(error)}"))


_registry = Registry()
reset = _registry.reset
register_plugin = _registry.register_plugin
unregister_plugin = _registry.unregister_plugin
plugin_manager = _registry.plugin_manager
source_of = _registry.source_of
broken_plugins = _registry.broken_plugins
plugins = _registry.plugins
collisions = _registry.collisions
get = _registry.get
entries = _registry.entries


def strategies() -> dict[str, Entry]:
    """The pruning strategies that are installed, by name."""
    return _registry.entries("strategies")


def adapters() -> dict[str, Entry]:
    """The model adapters that are installed, by name."""
    return _registry.entries("adapters")


def datasets() -> dict[str, Entry]:
    """The datasets that are installed, by name."""
    return _registry.entries("datasets")


def models() -> dict[str, Entry]:
    """The models that installed packages contain, by name."""
    return _registry.entries("models")
