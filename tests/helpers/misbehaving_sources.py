"""Sources of plugins of other kinds than strategies that misbehave, for `misbehaving`."""

from __future__ import annotations

OBSERVER = """
from tokenprune import hookimpl


@hookimpl
def tokenprune_decision_taken(run, stage, decision):
    {act}
"""

ADAPTER = """
from contextlib import contextmanager

import torch
from tokenprune import Adapter, hookimpl
from tokenprune.engine import BoundModel, PromptMasks, VisionCapture


@hookimpl
def tokenprune_register_adapters(register):
    register("bad", Bad)


class Bad(Adapter):
    @classmethod
    def matches(cls, source, config):
        return False

    @classmethod
    def load(cls, source, **options):
        raise NotImplementedError

    @classmethod
    def bind(cls, model):
        return Bound(model) if type(model).__name__ == "LlamaForCausalLM" else None


class Bound(BoundModel, VisionCapture):
    def __init__(self, model):
        self.name, self.decoder, self.tower_layers = "bad", model, 0

    def offers(self):
        return frozenset()

    @contextmanager
    def capture(self, reads):
        yield self

    def prompt_masks(self, queries):
        {act}

    def provide(self, read):
        raise NotImplementedError
"""

DATASET = """
from dataclasses import replace

from fake_segmentation import FakeData
from tokenprune import hookimpl


@hookimpl
def tokenprune_register_datasets(register):
    register("bad", Bad)


class Bad(FakeData):
    name = "bad"

    def scenes(self, split, limit=None, seed=0):
        for scene in super().scenes(split, limit, seed):
            yield replace(scene, queries=[{act} for query in scene.queries])
"""
