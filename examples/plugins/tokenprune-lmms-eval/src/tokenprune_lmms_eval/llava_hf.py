"""LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.simple.llava_hf import LlavaHf as LlavaHfSimple

from tokenprune_lmms_eval.pruned import Pruned


class PrunedLlavaHf(Pruned, LlavaHf):
    """lmms-eval's `llava_hf` with a chat template."""

    wraps = "llava_hf"


class PrunedLlavaHfSimple(Pruned, LlavaHfSimple):
    """lmms-eval's `llava_hf` with --force_simple."""

    wraps = "llava_hf"
