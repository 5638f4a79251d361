"""Calls the lifecycle hooks of all plugins for a run; `tokenprune.plugins.hookspecs` specifies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenprune.errors import PluginError, TokenPruneError
from tokenprune.plugins import registry
from tokenprune.plugins.attribution import blamed, brief
from tokenprune.plugins.readonly import ReadOnlyTensors


def notify(hook: str, *, strict: bool = False, **arguments: Any) -> None:
    """Call a lifecycle hook of every plugin that implements it.

    Args:
        hook: its name.
        strict: whether to detect writes to the objects that observers are shown.
        arguments: of the hook.

    Raises:
        PluginError: an observer raised, or modified what it was shown; names the first such plugin and its package,
            after all were called.
    """
    manager = registry.plugin_manager()
    implementations = getattr(manager.hook, hook).get_hookimpls()
    if not implementations:
        return
    failed: PluginError | None = None
    shown = _Shown(arguments) if strict else None
    for plugin in [implementation.plugin for implementation in reversed(implementations)]:
        others = [other for other in manager.get_plugins() if other is not plugin]

        def refuse(found: str, plugin: Any = plugin) -> PluginError:
            source = registry.source_of(plugin)
            problem = f"its hook {hook} failed with {found}"
            return PluginError.of(source.plugin, source.distribution, problem, "fix or uninstall it")

        try:
            with blamed(refuse):
                manager.subset_hook_caller(hook, others)(**arguments)
        except TokenPruneError as error:
            failed = failed or (error if isinstance(error, PluginError) and error.plugin else _named(refuse, error))
        written = None if shown is None else shown.written()
        if written is not None:
            failed = failed or refuse(f"a write to {written}, which is read-only for observers (work on a clone)")
            break
    if failed is not None:
        raise failed


def _named(refuse: Callable[[str], PluginError], error: Exception) -> PluginError:
    wrong = refuse(brief(error))
    wrong.__cause__ = error
    return wrong


class _Shown:
    """The parts of a run and of a decision that observers could modify."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._prefill = getattr(arguments["run"], "prefill", None)
        of_prefill: dict[str, Any] = {} if self._prefill is None else vars(self._prefill)
        self._parts = {
            name: of_prefill[name] for name in ("state", "trace", "layout", "strategy") if name in of_prefill
        }
        self._stages = list(getattr(self._parts.get("trace"), "stages", ()))
        self._tensors = ReadOnlyTensors()
        holders = {"run.prefill.state": self._parts.get("state"), "decision": arguments.get("decision")}
        for name, holder in holders.items():
            for key, value in vars(holder).items() if holder is not None else ():
                self._tensors.add(f"{name}.{key}", value)

    def written(self) -> str | None:
        """The name of what was modified, or None; replaced parts of the run are restored."""
        found = self._tensors.written()
        for name, part in self._parts.items():
            if getattr(self._prefill, name) is not part:
                setattr(self._prefill, name, part)
                found = f"run.prefill.{name}"
        trace = self._parts.get("trace")
        if trace is not None and list(map(id, trace.stages)) != list(map(id, self._stages)):
            trace.stages[:] = self._stages
            found = "run.trace.stages"
        return found
