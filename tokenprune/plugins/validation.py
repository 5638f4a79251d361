"""Checks of a plugin: its hooks exist, are of a supported version, and are plain functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pluggy

from tokenprune.errors import PluginError, nearest
from tokenprune.plugins.entries import Source
from tokenprune.plugins.hookspecs import HOOK_API

API_ATTRIBUTE = "tokenprune_hook_api"


def register(manager: pluggy.PluginManager, plugin: Any, source: Source) -> None:
    """Register a plugin with the manager.

    Raises:
        PluginError: it is a class, or one of its hooks takes an argument that the hook does not have.
    """
    if isinstance(plugin, type) and any(_needs_instance(manager, plugin, name) for name in dir(plugin)):
        problem = f"it is the class {plugin.__name__}, expected a module or an object; point the entry point at one"
        raise PluginError.of(source.plugin, source.distribution, problem)
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


def _needs_instance(manager: pluggy.PluginManager, kind: type, name: str) -> bool:
    is_method = inspect.isfunction(inspect.getattr_static(kind, name))
    return is_method and manager.parse_hookimpl_opts(kind, name) is not None


def check_plugin(manager: pluggy.PluginManager, plugin: Any, source: Source) -> None:
    """Check the version and the hooks of a registered plugin.

    Args:
        manager: that the plugin is registered in.
        plugin: the module or object.
        source: where it comes from.

    Raises:
        PluginError: another major version, a higher minor one, an unknown hook, a hook that is not a plain function,
            or no hook at all.
    """
    declared = api_of(plugin)
    version = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:\.\d+)?", declared)
    if version is None:
        problem = f"{API_ATTRIBUTE} = {declared!r} found, expected a version such as '{HOOK_API}'"
        raise PluginError.of(source.plugin, source.distribution, problem)
    major, minor = (int(part) for part in HOOK_API.split(".")[:2])
    if int(version[1]) != major or int(version[2] or 0) > minor:
        problem = f"it is built for version {declared} of the plugin hooks, this tokenprune has {HOOK_API}"
        advice = "install compatible releases of the two"
        raise PluginError.of(source.plugin, source.distribution, problem, advice)
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        name = getattr(plugin, "__name__", None)
        where = f"{type(plugin).__name__} {name!r}" if isinstance(name, str) else type(plugin).__name__
        problem = f"no hook found in the {where}; mark its functions with @tokenprune.hookimpl"
        raise PluginError.of(source.plugin, source.distribution, problem)
    specified = [name for name in vars(manager.hook) if getattr(manager.hook, name).has_spec()]
    for caller in callers:
        if not caller.has_spec():
            near = nearest(caller.name, specified, limit=1)
            advice = f"did you mean {near[0]}?" if near else "see tokenprune.plugins.hookspecs"
            raise PluginError.of(source.plugin, source.distribution, f"there is no hook {caller.name}", advice)
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin and (kind := _never_runs(implementation.function)):
                problem = f"its hook {caller.name} is {kind}, which would never run; expected a plain function"
                raise PluginError.of(source.plugin, source.distribution, problem)


def _never_runs(function: Callable[..., Any]) -> str:
    """The kind of a function that would not run when called; empty for a plain function."""
    kinds = {
        "a coroutine (async def)": inspect.iscoroutinefunction,
        "an asynchronous generator": inspect.isasyncgenfunction,
        "a generator or a hook wrapper (it has a yield)": inspect.isgeneratorfunction,
    }
    return next((kind for kind, holds in kinds.items() if holds(function)), "")


def api_of(plugin: Any) -> str:
    """The version of the hooks that a plugin declares; "1.0" by default."""
    return str(getattr(plugin, API_ATTRIBUTE, "1.0"))
