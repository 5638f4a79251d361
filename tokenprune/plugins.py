"""What a plugin registers: entries with a lazy target, where they come from, and how they are collected."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from tokenprune.errors import PluginError, TokenPruneError, nearest
from tokenprune.hookspecs import HOOK_API

OWN = "tokenprune"  # the distribution whose plugins are the built-in ones
LIMIT = "TOKENPRUNE_PLUGINS"
API_ATTRIBUTE = "tokenprune_hook_api"


@dataclass(frozen=True)
class Kind:
    """One kind of thing that plugins register.

    Attributes:
        noun: in the singular.
        hook: that registers it.
        base: "module:class" that targets are subclasses of; where empty, targets are called as they are.
        reserved: names that tokenprune itself uses.
    """

    noun: str
    hook: str
    base: str = ""
    reserved: frozenset[str] = frozenset()


COMMANDS = frozenset({"list", "compare", "segment", "inspect", "flops", "new"})  # tokenprune's own
KINDS = {
    "strategies": Kind("strategy", "tokenprune_register_strategies", "tokenprune.base:Strategy"),
    "adapters": Kind("adapter", "tokenprune_register_adapters", "tokenprune.adapter:Adapter"),
    "datasets": Kind("data set", "tokenprune_register_datasets", "tokenprune.datasets.base:Dataset"),
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
        """Name of the package that brings it (or of the plugin, when it was added in process)."""
        return self.source.distribution

    @property
    def version(self) -> str:
        """Version of that package; empty when it was added in process."""
        return self.source.version

    def load(self) -> Any:
        """The class or function itself.

        Raises:
            PluginError: it cannot be imported, or is not of its kind; names the plugin, its package and the cause.
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
            PluginError: it cannot be imported, or raised something that is no TokenPruneError.
        """
        target = getattr(self.load(), method) if method else self.load()
        try:
            return target(*arguments)
        except TokenPruneError:
            raise
        except Exception as error:
            where = f" in {method}()" if method else ""
            raise self.refusal(f"failed{where} with {first_line(error)}", "fix or uninstall it") from error

    def refusal(self, problem: str, advice: str = "") -> PluginError:
        """The error that says of this thing what is wrong with it."""
        what = f"{KINDS[self.kind].noun} {self.name!r} {problem}"
        return PluginError.of(self.source.plugin, self.distribution, what, advice)

    def _target(self) -> Any:
        if not isinstance(self.target, str):
            return self.target
        try:
            return _attribute(self.target)
        except Exception as error:
            problem = f"({self.target}) cannot be imported: {first_line(error)}"
            raise self.refusal(problem, "reinstall or fix the package") from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that was set aside because it could not be imported or registered."""

    name: str
    distribution: str
    version: str
    error: str


@dataclass(frozen=True)
class PluginStatus:
    """One plugin as `tokenprune list --plugins` shows it.

    Attributes:
        name: of the entry point, or as given to `register_plugin`.
        distribution: the package, or the plugin's name where there is none.
        version: of the package.
        origin: "built-in", "installed" or "this process".
        status: "works", "broken", "collides" (a name of it is taken) or "left out" (by TOKENPRUNE_PLUGINS).
        error: what is wrong; empty where it works.
        hook_api: the version of the hooks that it says it was built for; empty where it does not say.
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
    """What TOKENPRUNE_PLUGINS names, in lower case with "-" for "_"; None where it is not set: all are wanted."""
    given = os.environ.get(LIMIT)
    return None if given is None else {_plain(name) for name in given.split(",") if name.strip()}


def is_chosen(source: Source, chosen: set[str] | None) -> bool:
    """Whether a plugin is to be loaded: a built-in one always, another by its own or its package's name."""
    wanted = chosen is None or bool(chosen & {_plain(source.plugin), _plain(source.distribution)})
    return wanted or source.distribution == OWN


def missing(chosen: set[str] | None, sources: list[Source]) -> list[BrokenPlugin]:
    """The names in TOKENPRUNE_PLUGINS that no installed plugin and no package of one has."""
    known = {_plain(name) for source in sources for name in (source.plugin, source.distribution)}
    others = sorted({source.distribution for source in sources if source.distribution != OWN})
    listing = f"installed packages with plugins: {', '.join(others) or 'none'}"
    found = sorted((chosen or set()) - known)
    return [BrokenPlugin(name, LIMIT, "", f"no plugin and no package of this name; {listing}") for name in found]


def register(manager: pluggy.PluginManager, plugin: Any, source: Source) -> None:
    """Put a plugin into the manager.

    Raises:
        PluginError: one of its hooks takes an argument that the hook does not have.
    """
    try:
        manager.register(plugin, name=source.key)
    except pluggy.PluginValidationError as error:
        for name in dir(plugin):
            spec = getattr(getattr(manager.hook, name, None), "spec", None)
            if spec is None or not manager.parse_hookimpl_opts(plugin, name):
                continue
            given = list(inspect.signature(getattr(plugin, name)).parameters)
            if not set(given) <= set(spec.argnames):
                problem = f"its hook {name} takes {', '.join(given)}; expected some of: {', '.join(spec.argnames)}"
                raise PluginError.of(source.plugin, source.distribution, problem) from error
        raise


def check_plugin(manager: pluggy.PluginManager, plugin: Any, source: Source) -> None:
    """Refuse a plugin that was built for other hooks.

    Args:
        manager: that the plugin is registered in.
        plugin: the module or object.
        source: where it comes from.

    Raises:
        PluginError: another major version, a higher minor one, an unknown hook, or no hook at all.
    """
    declared = api_of(plugin)
    version = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.\d+)?", declared)
    if version is None:
        problem = f"{API_ATTRIBUTE} = {declared!r} found, expected a version such as '{HOOK_API}'"
        raise PluginError.of(source.plugin, source.distribution, problem)
    major, minor = (int(part) for part in HOOK_API.split(".")[:2])
    if int(version[1]) != major or int(version[2] or 0) > minor:
        problem = f"it is built for version {declared} of the plugin hooks, this tokenprune has {HOOK_API}"
        advice = "install a release of one of the two that fits the other"
        raise PluginError.of(source.plugin, source.distribution, problem, advice)
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        problem = "no hook found; mark its functions with @tokenprune.hookimpl"
        raise PluginError.of(source.plugin, source.distribution, problem)
    specified = [name for name in vars(manager.hook) if getattr(manager.hook, name).has_spec()]
    for caller in callers:
        if not caller.has_spec():
            near = nearest(caller.name, specified, limit=1)
            advice = f"did you mean {near[0]}?" if near else "see tokenprune.hookspecs"
            raise PluginError.of(source.plugin, source.distribution, f"there is no hook {caller.name}", advice)


def api_of(plugin: Any) -> str:
    """The version of the hooks that a plugin says it was built for; "1.0" where it does not say."""
    return str(getattr(plugin, API_ATTRIBUTE, "1.0"))


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
            _check(source, KINDS[kind], name, target)
            if (kind, name) in found:
                raise PluginError.of(source.plugin, source.distribution, f"it registers the {noun} {name!r} twice")
            found[kind, name] = Entry(name, kind, summary, source, target)

        manager.subset_hook_caller(hook, others)(register=register)
    return list(found.values())


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check(source: Source, kind: Kind, name: Any, target: Any) -> None:
    noun = kind.noun
    if not isinstance(name, str) or not name or name.split() != [name]:
        problem = f"found {name!r} as the name of a {noun}, expected a word without white space"
        raise PluginError.of(source.plugin, source.distribution, problem)
    if name in kind.reserved:
        problem = f"the {noun} {name!r} is tokenprune's own"
        raise PluginError.of(source.plugin, source.distribution, problem, "choose another name")
    if isinstance(target, str):
        module, colon, attribute = target.partition(":")
        valid = bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
    else:
        valid = callable(target)
    if not valid:
        problem = f'found {target!r} as the target of the {noun} {name!r}, expected a class or "module:attribute"'
        raise PluginError.of(source.plugin, source.distribution, problem)
