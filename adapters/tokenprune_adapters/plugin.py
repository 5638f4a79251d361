"""Registers the built-in adapters and bundled models, without importing them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl


@hookimpl
def tokenprune_register_adapters(register: Register) -> None:
    """One adapter for each family, and one for the vision-language models of transformers."""
    own = "tokenprune_adapters.hf:TransformersAdapter"
    register("transformers", own, summary="models of transformers: LLaVA, Qwen-VL, InternVL, SmolVLM, Gemma 3, …")
    register("lisa", "tokenprune_adapters.lisa:LisaAdapter", summary="LISA checkpoints in their original format")
    register("glamm", "tokenprune_adapters.glamm:GlammAdapter", summary="GLaMM checkpoints in their original format")
    pixellm = "tokenprune_adapters.pixellm:PixelLMAdapter"
    register("pixellm", pixellm, summary="PixelLM checkpoints in their original format")
    register("sa2va", "tokenprune_adapters.sa2va:Sa2vaAdapter", summary="Sa2VA checkpoints (InternVL, Qwen2 and SAM 2)")
    photos = "tokenprune_adapters.photos:PhotoAdapter"
    register("photos", photos, summary="small models of photographs on SmolLM2, such as photo-small")


@hookimpl
def tokenprune_register_models(register: Register) -> None:
    """Checkpoints that are included in this package."""
    register("lisa-tiny", "tokenprune_adapters.bundled:lisa_tiny", summary="a tiny LISA, trained on the dataset shapes")
