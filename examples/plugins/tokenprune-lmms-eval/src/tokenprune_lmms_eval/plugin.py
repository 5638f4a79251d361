"""A command of tokenprune: the results of lmms-eval as a table."""

from __future__ import annotations

from typing import Any

from tokenprune import hookimpl

tokenprune_hook_api = "1.0"  # the version of tokenprune's hooks that this is built for


@hookimpl
def tokenprune_register_commands(register: Any) -> None:
    """`tokenprune lmms-eval`."""
    register("lmms-eval", "tokenprune_lmms_eval.command:command", "accuracy of lmms-eval beside tokens and FLOPs")
