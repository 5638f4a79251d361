"""Qwen2.5-VL."""

from __future__ import annotations

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as Qwen2_5_VLSimple

from tokenprune_lmms_eval.pruned import Pruned


class PrunedQwen2_5_VL(Pruned, Qwen2_5_VL):
    """lmms-eval's `qwen2_5_vl` with a chat template."""

    wraps = "qwen2_5_vl"


class PrunedQwen2_5_VLSimple(Pruned, Qwen2_5_VLSimple):
    """lmms-eval's `qwen2_5_vl` with --force_simple."""

    wraps = "qwen2_5_vl"
