"""Hook specifications: what a plugin can register and what it can observe.

A plugin is a module (or any object) that implements some of these hooks with `@tokenprune.hookimpl`, named in the
entry-point group `tokenprune` of its package. Keep that module free of heavy imports: name targets as
"module:attribute" strings, which are imported when somebody uses them.
"""

from __future__ import annotations

from typing import Any, Protocol

import pluggy

PROJECT = "tokenprune"
ENTRY_POINT_GROUP = "tokenprune"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """The callback that the registration hooks receive."""

    def __call__(self, name: str, target: Any, summary: str = "") -> None:
        """Register one thing.

        Args:
            name: what users type; no white space, and only one package may register it.
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
    """Register data sets; each target is a subclass of `tokenprune.datasets.base.Dataset`."""


@hookspec
def tokenprune_register_models(register: Register) -> None:
    """Register names of models that a package brings along.

    Each target is a function without arguments that returns the checkpoint's folder (`pathlib.Path`).
    """


@hookspec
def tokenprune_run_started(run: Any) -> None:
    """A pruned prefill begins. `run` is the object that `with tokenprune.prune(...) as run` gives."""


@hookspec
def tokenprune_stage_entered(run: Any, stage: Any, decision: Any) -> None:
    """A stage begins: `stage` is its `StageTrace`, `decision` the validated answer for every row of the batch."""


@hookspec
def tokenprune_prefill_done(run: Any) -> None:
    """The last decoder layer of the prefill has run; `run.trace` and its ledger are complete."""


@hookspec
def tokenprune_run_finished(run: Any) -> None:
    """The context was left, with or without an exception; the model is as it was before."""
