"""What a plugin registers: entries with a lazily imported target, their source, and how they are collected."""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from tokenprune.errors import PluginError
from tokenprune.plugins.attribution import blamed, brief

OWN = "tokenprune-vlm"  # the distribution whose plugins are the built-in ones
LIMIT = "TOKENPRUNE_PLUGINS"


@dataclass(frozen=True)
class Kind:
    """One kind of thing that plugins register.

    Attributes:
        noun: in the singular.
        hook: that registers it.
        base: "module:class" that targets must subclass; if empty, targets are any callables.
        reserved: names that tokenprune uses itself.
    """

    noun: str
    hook: str
    base: str = ""
    reserved: frozenset[str] = frozenset()


# tokenprune's own
COMMANDS = frozenset(
    {
        *("list", "compare", "recommend", "sweep", "merge", "report", "tune"),
        *("segment", "answer", "inspect", "demo", "serve", "flops", "data", "new"),
    }
)
KINDS = {
    "strategies": Kind("strategy", "tokenprune_register_strategies", "tokenprune.core.strategy:Strategy"),
    "adapters": Kind("adapter", "tokenprune_register_adapters", "tokenprune.loading.adapter:Adapter"),
    "datasets": Kind("dataset", "tokenprune_register_datasets", "tokenprune.datasets.base:Dataset"),
    "models": Kind("model", "tokenprune_register_models"),
    "metrics": Kind("metric", "tokenprune_register_metrics"),
    "segmenters": Kind("segmenter", "tokenprune_register_segmenters"),
    "report_sections": Kind("report section", "tokenprune_register_report_sections"),
    "commands": Kind("command", "tokenprune_register_commands", reserved=COMMANDS),
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
        """Name of the package that registers it (or of the plugin, if it was added in process)."""
        return self.source.distribution

    @property
    def version(self) -> str:
        """Version of that package; empty if it was added in process."""
        return self.source.version

    def load(self) -> Any:
        """The class or function itself.

        Raises:
            PluginError: it cannot be imported, or is of another kind; names the plugin, its package and the cause.
        """
        found = self._target()
        base = KINDS[self.kind].base
        if base and not (isinstance(found, type) and issubclass(found, _attribute(base))):
            kind = found.__name__ if isinstance(found, type) else repr(found)
            raise self.refusal(f"is {kind}, expected a subclass of {base.replace(':', '.')}", "fix or uninstall it")
        return found

    def call(self, *arguments: Any, method: str = "") -> Any:
        """Call the target, or a method of it.

        Raises:
            PluginError: it cannot be imported, or raised something other than a TokenPruneError.
        """
        found = self.load()
        with self.running(method):
            target = getattr(found, method) if method else found
            return target(*arguments)

    def running(self, method: str = "") -> AbstractContextManager[None]:
        """A context for running the target's code: other errors become PluginErrors, as in `call`."""
        where = f" in {method}()" if method else ""
        return blamed(lambda found: self.refusal(f"failed{where} with {found}", "fix or uninstall it"))

    def refusal(self, problem: str, advice: str = "") -> PluginError:
        """The error about this entry."""
        what = f"{KINDS[self.kind].noun} {self.name!r} {problem}"
        return PluginError.of(self.source.plugin, self.distribution, what, advice)

    def _target(self) -> Any:
        if not isinstance(self.target, str):
            return self.target
        try:
            return _attribute(self.target)
        except (Exception, SystemExit) as error:
            problem = f"({self.target}) cannot be imported: {brief(error)}"
            raise self.refusal(problem, "reinstall or fix the package") from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be imported or registered."""

    name: str
    distribution: str
    version: str
    error: str


@dataclass(frozen=True)
class PluginStatus:
    """One plugin as `tokenprune list --plugins` shows it.

    Attributes:
        name: of the entry point, or as given to `register_plugin`.
        distribution: the package, or the plugin's name if it has none.
        version: of the package.
        origin: "built-in", "installed" or "this process".
        status: "works", "broken", "collides" (a name of it is taken) or "left out" (by TOKENPRUNE_PLUGINS).
        error: what is wrong; empty if it works.
        hook_api: the version of the hooks that it declares; empty if it could not be loaded.
        registers: names by kind.
    """

    name: str
    distribution: str
    version: str
    origin: str
    status: str = "works"
    error: str = ""
    hook_api: str = ""
    registers: dict[str, list[str]] = field(default_factory=dict)


def chosen_plugins() -> set[str] | None:
    """The names in TOKENPRUNE_PLUGINS, in lower case with "-" for "_"; None if it is not set: all are loaded."""
    given = os.environ.get(LIMIT)
    return None if given is None else {_plain(name) for name in given.split(",") if name.strip()}


def is_chosen(source: Source, chosen: set[str] | None) -> bool:
    """Whether a plugin is loaded: built-in ones always, others by their own or their package's name."""
    wanted = chosen is None or bool(chosen & {_plain(source.plugin), _plain(source.distribution)})
    return wanted or source.distribution == OWN


def missing(chosen: set[str] | None, sources: list[Source]) -> list[BrokenPlugin]:
    """The names in TOKENPRUNE_PLUGINS that match no installed plugin and no package with plugins."""
    known = {_plain(name) for source in sources for name in (source.plugin, source.distribution)}
    others = sorted({source.distribution for source in sources if source.distribution != OWN})
    listing = f"installed packages with plugins: {', '.join(others) or 'none'}"
    found = sorted((chosen or set()) - known)
    return [BrokenPlugin(name, LIMIT, "", f"no plugin and no package is named {name!r}; {listing}") for name in found]


def collect(manager: pluggy.PluginManager, plugin: Any, source: Source) -> list[Entry]:
    """Call the registration hooks of one plugin.

    Raises:
        PluginError: a name, target or summary that cannot be registered, a name that this plugin registers twice, or
            a hook that raised something.
    """
    others = [other for other in manager.get_plugins() if other is not plugin]
    found: dict[tuple[str, str], Entry] = {}
    for kind, (noun, hook) in ((key, (value.noun, value.hook)) for key, value in KINDS.items()):

        def register(name: str, target: Any, summary: str = "", kind: str = kind, noun: str = noun) -> None:
            _check(source, KINDS[kind], name, target, summary)
            if (kind, name) in found:
                raise PluginError.of(source.plugin, source.distribution, f"it registers the {noun} {name!r} twice")
            found[kind, name] = Entry(name, kind, summary, source, target)

        with blamed(lambda said, hook=hook: _failed(source, hook, said)):  # type: ignore[misc]
            manager.subset_hook_caller(hook, others)(register=register)
    return list(found.values())


def _failed(source: Source, hook: str, said: str) -> PluginError:
    return PluginError.of(source.plugin, source.distribution, f"its hook {hook} failed with {said}")


def not_loaded(broken: list[BrokenPlugin]) -> str:
    """An addition to messages about unknown names: the plugins that could not be loaded; empty if there are none."""
    names = ", ".join(f"{plugin.name!r} of package {plugin.distribution!r}" for plugin in broken)
    return f"; could not be loaded: plugin {names} (tokenprune list --plugins says why)" if names else ""


def collision(entries: list[Entry]) -> str:
    """The message about a name that several packages register."""
    noun, name = KINDS[entries[0].kind].noun, entries[0].name
    packages = [repr(entry.distribution) for entry in entries]
    number = "two" if len(packages) == 2 else str(len(packages))
    listing = f"{', '.join(packages[:-1])} and {packages[-1]}"
    return f"{noun} {name!r} is registered by {number} packages, {listing}; uninstall one of them, or see {LIMIT}"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check(source: Source, kind: Kind, name: Any, target: Any, summary: Any) -> None:
    noun = kind.noun
    if not isinstance(name, str) or not name or name.split() != [name]:
        problem = f"found {name!r} as the name of a {noun}, expected a word without white space"
        raise PluginError.of(source.plugin, source.distribution, problem)
    if name in kind.reserved:
        problem = f"the {noun} {name!r} is tokenprune's own"
        raise PluginError.of(source.plugin, source.distribution, problem, "choose another name")
    if not isinstance(summary, str):
        problem = f"found {summary!r} as the summary of the {noun} {name!r}, expected a line of text"
        raise PluginError.of(source.plugin, source.distribution, problem)
    if isinstance(target, str):
        module, colon, attribute = target.partition(":")
        valid = bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
    else:
        valid = callable(target)
    if not valid:
        problem = f'found {target!r} as the target of the {noun} {name!r}, expected a class or "module:attribute"'
        raise PluginError.of(source.plugin, source.distribution, problem)
