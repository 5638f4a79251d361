"""Registers the strategy `second-look`; imports nothing heavy, so that `tokenprune list` stays fast."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl

tokenprune_hook_api = "1.0"  # the version of tokenprune's hooks that this is built for


@hookimpl
def tokenprune_register_strategies(register: Register) -> None:
    """One strategy; its module is imported when it is used."""
    register(
        "second-look",
        "tokenprune_second_look.strategy:SecondLook",
        summary="long values stay, similar ones are merged into them, some are given back later",
    )
