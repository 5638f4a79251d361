"""Registers the adapter `voxtral`; imports nothing heavy, so that `tokenprune list` stays fast."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl

tokenprune_hook_api = "1.0"  # the version of tokenprune's hooks that this is built for


@hookimpl
def tokenprune_register_adapters(register: Register) -> None:
    """One adapter; its module is imported when a model is loaded or pruned."""
    register("voxtral", "tokenprune_voxtral.adapter:VoxtralAdapter", summary="Voxtral speech models")
