"""Hook specifications: what a plugin can register and what it can observe.

A plugin is a module (or any object) that implements some of these hooks with `@tokenprune.hookimpl`, named in the
entry-point group `tokenprune` of its package. Keep that module free of heavy imports: name targets as
"module:attribute" strings, which are imported on first use.

`HOOK_API` is the semantic version of these hooks: a new hook or argument raises its second number; a hook or argument
that is removed or changes its meaning raises the first. A plugin declares the version that it was built for with an
attribute next to its hooks, `tokenprune_hook_api = "1.0"` (the default). Another first number is refused, and so is a
higher second number.

Examples:
    >>> import tokenprune as tp
    >>> from tokenprune.plugins import registry
    >>> class MyPlugin:
    ...     @tp.hookimpl
    ...     def tokenprune_register_strategies(self, register):
    ...         register("my-method", "my_package.strategy:MyMethod", "what it does, in one line")
    >>> registry.register_plugin(MyPlugin(), "my-plugin")
    >>> tp.strategies()["my-method"].summary
    'what it does, in one line'
    >>> registry.unregister_plugin("my-plugin")
"""

from __future__ import annotations

from typing import Any, Protocol

import pluggy

PROJECT = "tokenprune"
ENTRY_POINT_GROUP = "tokenprune"
HOOK_API = "1.0.0"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """The callback that the registration hooks receive."""

    def __call__(self, name: str, target: Any, summary: str = "") -> None:
        """Register one thing.

        Args:
            name: what users type; without white space, and registered by one package only.
            target: "module:attribute", imported on first use, or the class or function itself.
            summary: one line for `tokenprune list`.
        """


@hookspec
def tokenprune_register_strategies(register: Register) -> None:
    """Register pruning strategies; each target is a subclass of `tokenprune.Strategy`."""


@hookspec
def tokenprune_register_adapters(register: Register) -> None:
    """Register model adapters; each target is a subclass of `tokenprune.Adapter`."""


@hookspec
def tokenprune_register_datasets(register: Register) -> None:
    """Register datasets; each target is a subclass of `tokenprune.datasets.base.Dataset`."""


@hookspec
def tokenprune_register_models(register: Register) -> None:
    """Register names of models that a package contains.

    Each target is a function without arguments that returns the checkpoint's folder (`pathlib.Path`).
    """


@hookspec
def tokenprune_register_metrics(register: Register) -> None:
    """Register metrics of single queries; `compare` shows their mean over queries.

    Each target is a function of a `tokenprune.evaluation.measured.Measured` that returns a number, or None if the
    metric is not defined for the query.
    """


@hookspec
def tokenprune_register_segmenters(register: Register) -> None:
    """Register functions that find instances in an image, for options like `segmenter` of `csp`.

    Each target takes the image, uint8 [H, W, 3] (numpy), and returns masks, bool [instances, H, W].
    """


@hookspec
def tokenprune_register_report_sections(register: Register) -> None:
    """Register parts of what `compare --out` writes.

    Each target is a function of the `tokenprune.evaluation.comparison.results.Comparison` and the folder
    (`pathlib.Path`) that returns the paths of the files that it wrote.
    """


@hookspec
def tokenprune_register_commands(register: Register) -> None:
    """Register commands: `register("census", ...)` adds `tokenprune census`.

    Each target is a `typer.Typer` app, or a function with Typer's annotations. It is imported when the command runs;
    until then `tokenprune --help` shows the summary.
    """


@hookspec
def tokenprune_run_started(run: Any) -> None:
    """A pruning context was opened.

    Args:
        run: here and in all other hooks, the object that `with tokenprune.prune(...) as run` gives.
    """


@hookspec
def tokenprune_stage_entered(run: Any, stage: Any) -> None:
    """A stage begins; the strategy has not chosen yet.

    Args:
        run: the run; `run.prefill` is the prefill, `run.state` its tokens, `run.trace` the record so far.
        stage: the `Stage` as the strategy declared it.
    """


@hookspec
def tokenprune_decision_taken(run: Any, stage: Any, decision: Any) -> None:
    """A stage's decision was checked and carried out.

    Args:
        run: the run; `run.state` holds the tokens after the decision.
        stage: the stage's record in the trace (`StageTrace`).
        decision: the validated `Keep`, `Restore` or `Merge` for every row of the batch.
    """


@hookspec
def tokenprune_prefill_done(run: Any) -> None:
    """The last decoder layer of the prefill has run; `run.trace` and its ledger are complete."""


@hookspec
def tokenprune_run_finished(run: Any) -> None:
    """The context was left, with or without an exception."""
