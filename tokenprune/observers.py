"""The lifecycle hooks of all plugins, called for one run; `tokenprune.hookspecs` says when and with what."""

from __future__ import annotations

from typing import Any

from tokenprune import registry
from tokenprune.errors import PluginError
from tokenprune.plugins import first_line


def tokenprune_run_started(*, run: Any) -> None:
    """A pruning context was opened. Raises PluginError as `notify` does, like all the others."""
    notify("tokenprune_run_started", run=run)


def tokenprune_stage_entered(*, run: Any, stage: Any) -> None:
    """A stage begins."""
    notify("tokenprune_stage_entered", run=run, stage=stage)


def tokenprune_decision_taken(*, run: Any, stage: Any, decision: Any) -> None:
    """A stage's decision was carried out."""
    notify("tokenprune_decision_taken", run=run, stage=stage, decision=decision)


def tokenprune_prefill_done(*, run: Any) -> None:
    """The last layer of a prefill has run."""
    notify("tokenprune_prefill_done", run=run)


def tokenprune_run_finished(*, run: Any) -> None:
    """The context was left."""
    notify("tokenprune_run_finished", run=run)


def notify(hook: str, **arguments: Any) -> None:
    """Call a lifecycle hook of every plugin that implements it.

    Raises:
        PluginError: an observer raised; names the first such plugin and its package, once all were called.
    """
    failed: PluginError | None = None
    manager = registry.plugin_manager()
    implementations = getattr(manager.hook, hook).get_hookimpls()
    for plugin in [implementation.plugin for implementation in reversed(implementations)]:
        others = [other for other in manager.get_plugins() if other is not plugin]
        try:
            manager.subset_hook_caller(hook, others)(**arguments)
        except Exception as error:
            source = registry.source_of(plugin)
            problem = f"its hook {hook} failed with {first_line(error)}"
            wrong = PluginError.of(source.plugin, source.distribution, problem, "fix or uninstall it")
            wrong.__cause__ = error
            failed = failed or wrong
    if failed is not None:
        raise failed
