"""Qwen3-VL and Qwen3.5."""

from __future__ import annotations

from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from lmms_eval.models.simple.qwen3_vl import Qwen3_VL as Qwen3_VLSimple

from tokenprune_lmms_eval.pruned import Pruned


class PrunedQwen3_VL(Pruned, Qwen3_VL):
    """lmms-eval's `qwen3_vl` with a chat template."""

    wraps = "qwen3_vl"


class PrunedQwen3_VLSimple(Pruned, Qwen3_VLSimple):
    """lmms-eval's `qwen3_vl` with --force_simple."""

    wraps = "qwen3_vl"
