"""Registers the built-in strategies; imports none of them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl


@hookimpl
def tokenprune_register_strategies(register: Register) -> None:
    """Baselines first, then the methods in order of their name."""
    here = "tokenprune_strategies"
    register("none", f"{here}.baselines:NoPruning", summary="the untouched model")
    register("blind", f"{here}.baselines:Blind", summary="no image token enters the decoder: the floor")
    register("random", f"{here}.baselines:Random", summary="image tokens chosen at random, seeded")
    register("uniform", f"{here}.baselines:Uniform", summary="image tokens on a regular grid")
    register("csp", f"{here}.csp.csp:CSP", summary="cluster, scatter, prune: few tokens, all tokens, the attended ones")
    register("csp-65", f"{here}.csp.presets:CSP65", summary="csp at 65 % fewer equivalent image tokens")
    register("csp-70", f"{here}.csp.presets:CSP70", summary="csp at 70 % fewer equivalent image tokens")
    register(
        "fastv", f"{here}.fastv:FastV", summary="the image tokens that the query row attends to after an early layer"
    )
    register(
        "prumerge",
        f"{here}.prumerge.prumerge:PruMerge",
        summary="[CLS]-attended image tokens, neighbours merged into them",
    )
    register("prumerge+", f"{here}.prumerge.prumerge:PruMergePlus", summary="prumerge and spatially uniform tokens")
    register("divprune", f"{here}.divprune:DivPrune", summary="image tokens most unlike each other, before the decoder")
    register("similarity", f"{here}.similarity:Similarity", summary="image tokens most unlike each other, at a layer")
    register("tome", f"{here}.tome:ToMe", summary="image tokens most like each other, merged")
    register(
        "visionzip",
        f"{here}.visionzip.visionzip:VisionZip",
        summary="[CLS]-attended image tokens, the others merged into few",
    )
    register("cdpruner", f"{here}.cdpruner:CDPruner", summary="image tokens most diverse given the question, by CLIP")
    register("litelvlm", f"{here}.litelvlm:LiteLVLM", summary="image tokens least like the question in CLIP's space")
    register(
        "pyramiddrop", f"{here}.pyramiddrop:PyramidDrop", summary="ever fewer image tokens, by the attention to come"
    )
    register(
        "sparsevlm",
        f"{here}.sparsevlm.sparsevlm:SparseVLM",
        summary="image tokens that the text like the image rates high",
    )
    register(
        "sparsevlm+",
        f"{here}.sparsevlm.sparsevlm:SparseVLMPlus",
        summary="the same by better heads, free of what positions make",
    )
    register("dart", f"{here}.dart:DART", summary="the image tokens least like a few pivots: duplicates go")
