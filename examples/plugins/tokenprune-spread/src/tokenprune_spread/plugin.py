"""Registers the strategy `spread`; imports nothing heavy, so that `tokenprune list` stays fast."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl

tokenprune_hook_api = "1.0"  # the version of tokenprune's hooks that this is built for


@hookimpl
def tokenprune_register_strategies(register: Register) -> None:
    """One strategy; its module is imported when it is used."""
    register("spread", "tokenprune_spread.strategy:Spread", summary="the image tokens that lie farthest apart")
