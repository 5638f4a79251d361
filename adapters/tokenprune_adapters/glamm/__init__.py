"""GLaMM (Rasheed et al., arXiv 2311.03356): pixel grounding with a LLaMA decoder, a CLIP tower and SAM."""

from __future__ import annotations

from tokenprune_adapters.glamm.adapter import GlammAdapter
from tokenprune_adapters.glamm.model import GlammModel
from tokenprune_adapters.glamm.results import GroundedSegmentation

__all__ = ["GlammAdapter", "GlammModel", "GroundedSegmentation"]
