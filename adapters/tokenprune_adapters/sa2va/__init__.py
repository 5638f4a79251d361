"""Sa2VA (Yuan et al., arXiv 2501.04001): segmentation with InternVL's tower, a Qwen2 decoder and SAM 2."""

from __future__ import annotations

from tokenprune_adapters.sa2va.adapter import Sa2vaAdapter
from tokenprune_adapters.sa2va.model import Sa2vaModel
from tokenprune_adapters.segmentation.data import Segmentation

__all__ = ["Sa2vaAdapter", "Sa2vaModel", "Segmentation"]
