"""The engine: runs a strategy on a transformers decoder by intercepting its calls, and leaves nothing behind.

Belongs here: code that applies the decisions of `core/` to hidden states, masks, positions and caches. What stages read
of the decoder (the attention tap) is in `reads/`, KV caches in `caches/`, the shortened sequence in `sequence/`, the
classes that adapters implement in `interface/`, the interception of calls in `calls/`. Adapters and plugins import the
names below.
"""

from __future__ import annotations

from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.calls.wrappers import uncompiled
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture, arguments, padding_mask
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.engine.interface.turns import model_turn
from tokenprune.engine.interface.vision_source import VisionSource
from tokenprune.engine.pruning import open_run, prune
from tokenprune.engine.run import PruningRun
from tokenprune.engine.unpruned import shared_prefill

__all__ = [
    "BoundModel",
    "PromptMasks",
    "PruningRun",
    "VisionCapture",
    "VisionSource",
    "arguments",
    "model_turn",
    "open_run",
    "padding_mask",
    "prune",
    "shadowed",
    "shared_prefill",
    "uncompiled",
]
