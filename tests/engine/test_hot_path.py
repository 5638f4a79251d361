"""How often a prefill calls the package's own functions: a decoder of n layers pays for each of them n times."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import tokenprune as tp
from tokenprune.testing.tiny_decoders import tiny_llama

PACKAGE = str(Path(tp.__file__).parent)
PER_LAYER = 20


def calls_of_a_prefill(layers: int) -> Counter[str]:
    model, ids = tiny_llama(layers=layers), torch.arange(1, 25)[None]
    image_tokens = (ids > 4) & (ids < 21)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[f"{frame.f_code.co_filename}: {frame.f_code.co_name}"] += 1

    with torch.no_grad(), tp.prune(model, tp.strategy("fastv", layer=1, keep=4), image_tokens=image_tokens):
        model(ids)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            model(ids)
        finally:
            sys.setprofile(before)
    return calls


def test_a_layer_more_costs_few_calls() -> None:
    few, many = calls_of_a_prefill(4), calls_of_a_prefill(8)
    extra = many - few
    assert extra.total() <= 4 * PER_LAYER, f"per layer: {[(name, n / 4) for name, n in extra.most_common()]}"
