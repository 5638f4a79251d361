"""What may stand for an image: the core's rule, under the name that adapters know it by."""

from __future__ import annotations

from tokenprune.utils.images import ImageInput, to_rgb

__all__ = ["ImageInput", "to_rgb"]
