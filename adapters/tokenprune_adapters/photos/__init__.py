"""A reasoning-segmentation model on real photographs: SmolLM2 as decoder, EfficientNet-Lite0's grid as image tokens."""

from __future__ import annotations

from tokenprune_adapters.photos.adapter import PhotoAdapter
from tokenprune_adapters.photos.model import PhotoModel

__all__ = ["PhotoAdapter", "PhotoModel"]
