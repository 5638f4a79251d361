"""Inputs and scripts for the tiny vision-language models of transformers' families."""

from __future__ import annotations

import functools

import pytest
import torch
from vlm_families import FAMILIES, NAMES
from vlm_known import model_of

import tokenprune
from tokenprune.core.layout import SequenceLayout
from tokenprune.testing.scripted import Scripted, random_script

LAYERS, WIDTH = 4, 32


SIZES = [(24, 32), (40, 20)]


TOLERANCE = 3e-5


names = pytest.mark.parametrize("name", NAMES)


@functools.cache
def inputs_of(name, sizes=tuple(SIZES), **options):
    return FAMILIES[name].inputs(list(sizes), **options)


@functools.cache
def several_images_of(name):
    return FAMILIES[name].inputs([[(24, 32), (32, 24)], (40, 20)])


_layouts: dict[tuple[str, int], tuple[object, SequenceLayout]] = {}  # with the inputs, whose id names them


def layout_of(name, inputs):
    """As the adapter sees it; separators of lines (LLaVA-NeXT, LLaVA-OneVision) are text. Inputs are not changed."""
    key = name, id(inputs)
    if key not in _layouts:
        with torch.no_grad(), tokenprune.prune(model_of(name), Scripted([])) as run:
            model_of(name)(**inputs)
        _layouts[key] = inputs, run.trace.layout
    return _layouts[key][1]


def script_of(name, inputs, seed):
    return random_script(layout_of(name, inputs).slots >= 0, LAYERS, WIDTH, seed)
