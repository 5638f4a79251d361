"""The vision-language models of transformers, through one adapter that reads their configuration."""

from __future__ import annotations

from tokenprune_adapters.hf.adapter import TransformersAdapter
from tokenprune_adapters.hf.bound_model import BoundTransformersModel
from tokenprune_adapters.hf.families import FAMILIES, Family

__all__ = ["FAMILIES", "BoundTransformersModel", "Family", "TransformersAdapter"]
