"""LISA (Lai et al., arXiv 2308.00692): reasoning segmentation with a LLaMA decoder, a CLIP tower and SAM."""

from __future__ import annotations

from tokenprune_adapters.lisa.adapter import LisaAdapter
from tokenprune_adapters.lisa.model import LisaModel
from tokenprune_adapters.segmentation.data import Segmentation

__all__ = ["LisaAdapter", "LisaModel", "Segmentation"]
