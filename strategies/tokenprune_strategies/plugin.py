"""Registers the built-in strategies, without importing them."""

from __future__ import annotations

from tokenprune.plugins.hookspecs import Register, hookimpl


@hookimpl
def tokenprune_register_strategies(register: Register) -> None:
    """Baselines first, then the methods."""
    here = "tokenprune_strategies"
    register("none", f"{here}.baselines:NoPruning", summary="no pruning")
    register("blind", f"{here}.baselines:Blind", summary="no image tokens: the lower bound")
    register("random", f"{here}.baselines:Random", summary="random image tokens, with a seed")
    register("uniform", f"{here}.baselines:Uniform", summary="image tokens on a regular grid")
    register(
        "csp", f"{here}.csp.csp:CSP", summary="cluster, scatter, prune: few tokens, all tokens, most attended tokens"
    )
    register("csp+", f"{here}.csp.plus:CSPPlus", summary="csp with all tokens in one layer alone")
    register("csp-65", f"{here}.csp.presets:CSP65", summary="csp with 65 % fewer equivalent tokens")
    register("csp-70", f"{here}.csp.presets:CSP70", summary="csp with 70 % fewer equivalent tokens")
    register(
        "fastv", f"{here}.fastv:FastV", summary="the image tokens that the query row attends to most in an early layer"
    )
    register(
        "prumerge",
        f"{here}.prumerge.prumerge:PruMerge",
        summary="image tokens that [CLS] attends to most, with similar ones merged into them",
    )
    register(
        "prumerge+", f"{here}.prumerge.prumerge:PruMergePlus", summary="prumerge with additional, evenly spaced tokens"
    )
    register("divprune", f"{here}.divprune:DivPrune", summary="the most dissimilar image tokens, before the decoder")
    register(
        "similarity", f"{here}.similarity:Similarity", summary="the most dissimilar image tokens, at a decoder layer"
    )
    register("tome", f"{here}.tome:ToMe", summary="merges the most similar image tokens")
    register(
        "visionzip",
        f"{here}.visionzip.visionzip:VisionZip",
        summary="image tokens that [CLS] attends to most, the others merged into a few",
    )
    register(
        "vispruner",
        f"{here}.vispruner.vispruner:VisPruner",
        summary="image tokens that [CLS] attends to most, and distinct ones of the others",
    )
    register(
        "fastervlm", f"{here}.vispruner.vispruner:FasterVLM", summary="the image tokens that [CLS] attends to most"
    )
    register(
        "vscan",
        f"{here}.vscan.vscan:VScan",
        summary="patches of each window and of the whole image, then the tokens that the query attends to",
    )
    register(
        "cdpruner",
        f"{here}.cdpruner:CDPruner",
        summary="diverse image tokens, weighted by relevance to the question (CLIP)",
    )
    register(
        "litelvlm",
        f"{here}.litelvlm:LiteLVLM",
        summary="the image tokens least similar to the question in CLIP's space",
    )
    register(
        "pyramiddrop",
        f"{here}.pyramiddrop:PyramidDrop",
        summary="fewer image tokens at each of several layers, by the attention of the next layer",
    )
    register(
        "feather",
        f"{here}.feather.feather:Feather",
        summary="an even grid and the image tokens that unrotated attention prefers, at two layers",
    )
    register(
        "sparsevlm",
        f"{here}.sparsevlm.sparsevlm:SparseVLM",
        summary="image tokens attended to by the text most similar to the image",
    )
    register(
        "sparsevlm+",
        f"{here}.sparsevlm.sparsevlm:SparseVLMPlus",
        summary="sparsevlm with the best heads, and attention corrected for positions",
    )
    register(
        "dart",
        f"{here}.dart:DART",
        summary="the image tokens least similar to a few pivots, so that duplicates are dropped",
    )
    register(
        "holov", f"{here}.holov:HoloV", summary="image tokens that [CLS] attends to most in each block of the image"
    )
    register(
        "ivcprune",
        f"{here}.ivcprune.ivcprune:IVCPrune",
        summary="image tokens whose positions serve as coordinates, and those whose values resemble the text's",
    )
    register(
        "prunesid",
        f"{here}.prunesid.prunesid:PruneSID",
        summary="image tokens that [CLS] attends to most, and distinct ones, of each group of similar features",
    )
    register(
        "nuwa",
        f"{here}.nuwa.nuwa:Nuwa",
        summary="anchors in all parts of the image that take in similar near tokens, then those most attended to",
    )
    register(
        "knorm", f"{here}.knorm:KNorm", summary="the image tokens whose keys have the smallest norm in an early layer"
    )
    register(
        "vitcop",
        f"{here}.vitcop.vitcop:ViTCoP",
        summary="patches that [CLS] attends to, merged by clusters, then those whose keys have the smallest norm",
    )
