"""Recognising and loading GLaMM checkpoints in their original format."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.utils.arguments import whole_number
from tokenprune_adapters.common.load_options import LoadOptions
from tokenprune_adapters.glamm.model import GlammModel
from tokenprune_adapters.glamm.prompts import PHRASE_END, PHRASE_START
from tokenprune_adapters.segmentation.loading import Opened, SegmenterAdapter
from tokenprune_adapters.segmentation.sam.loading import sam_segmenter_parts

SAM_PREFIX = "model.grounding_encoder."
REGION_ENCODER = "model.region_encoder."


@dataclass(frozen=True)
class GlammOptions(LoadOptions):
    """`LoadOptions` and the seed of the templates.

    Args:
        template_seed: seed of the question and answer templates.

    Raises:
        OptionError: a seed that is no whole number.
    """

    template_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("template_seed", self.template_seed)


class GlammAdapter(SegmenterAdapter):
    """GLaMM checkpoints in the format of their authors, on LLaMA, CLIP and SAM; for the options see `GlammOptions`.

    The region encoder, which works only on boxes that are given, is left out; `GlammModel.left_out` says so.
    """

    family = "GLaMM"
    prefix = SAM_PREFIX + "image_encoder."
    options = GlammOptions

    @classmethod
    def build(cls, opened: Opened[GlammOptions]) -> GlammModel:
        """The model of an opened checkpoint."""
        tokenizer = opened.tokenizer([*GlammModel.seg_tokens, PHRASE_START, PHRASE_END])
        parts = sam_segmenter_parts(opened, SAM_PREFIX, _of_regions)
        return GlammModel(
            tokenizer=tokenizer,
            template_seed=opened.options.template_seed,
            left_out=[REGION_ENCODER.removesuffix(".")] if any(map(_of_regions, opened.checkpoint.names())) else [],
            **parts,
        )


def _of_regions(name: str) -> bool:
    return name.startswith(REGION_ENCODER)
