"""Segmentation models with a CLIP tower for the decoder and SAM for the masks: LISA, GLaMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM, SamModel

from tokenprune.engine import VisionSource
from tokenprune_adapters import sam_masks
from tokenprune_adapters.clip import ClipPixels
from tokenprune_adapters.clip_space import ClipSpace
from tokenprune_adapters.images import ImageInput, to_rgb
from tokenprune_adapters.llava_vision import run_tower, vision_source
from tokenprune_adapters.segmentation import EncodedImage, PreparedImage
from tokenprune_adapters.segmenter import Segmenter
from tokenprune_adapters.tokenizer import LlamaSlowTokenizer


class SamSegmenter(Segmenter):
    """A model that shows the image to CLIP and, a second time, to SAM.

    Args:
        decoder: the language model.
        tower: CLIP, whose patch features become the image tokens.
        projector: from the tower's width to the decoder's.
        sam: its encoder sees the image a second time, its mask decoder draws the masks.
        mask_projection: from a mask query's final state to the prompt embedding of SAM's mask decoder.
        tokenizer: text to ids.
        clip_pixels: the tower's image processor.
        select_layer: index of the tower's hidden states that the projector reads.
        mark_image: whether prompts have <im_start> and <im_end> around the image.
        name: shown in reports.
        clip_space: see `Segmenter`.
    """

    def __init__(
        self,
        *,
        decoder: LlamaForCausalLM,
        tower: CLIPVisionModel,
        projector: nn.Module,
        sam: SamModel,
        mask_projection: nn.Sequential,
        tokenizer: LlamaSlowTokenizer,
        clip_pixels: ClipPixels,
        select_layer: int,
        mark_image: bool,
        name: str,
        clip_space: ClipSpace | None = None,
    ) -> None:
        super().__init__(decoder=decoder, tokenizer=tokenizer, mark_image=mark_image, name=name, clip_space=clip_space)
        self.tower = tower
        self.projector = projector
        self.sam = sam
        self.mask_projection = mask_projection
        self.clip_pixels = clip_pixels
        self.select_layer = select_layer

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Pixels for both towers.

        Raises:
            InputError: not an image.
        """
        rgb = to_rgb(image)
        config: Any = self.sam.config.vision_config
        pixels, sizes = sam_masks.preprocess(rgb, config.image_size)
        return PreparedImage(self.clip_pixels(rgb), pixels, sizes)

    def encode_image(self, image: ImageInput | PreparedImage | EncodedImage) -> EncodedImage:
        """Tower features, image tokens and SAM's image embedding. What is encoded already is returned as it is.

        Raises:
            InputError: not an image.
        """
        if isinstance(image, EncodedImage):
            return image
        prepared = image if isinstance(image, PreparedImage) else self.prepare_image(image)
        tower = run_tower(self.tower, prepared.clip_pixels, self.select_layer)
        sam_embedding = sam_masks.embed_image(self.sam, prepared.sam_pixels.to(tower.features))
        return EncodedImage(prepared, tower, self.projector(tower.features), sam_embedding)

    def vision_source(
        self, encoded: EncodedImage, rows: int, texts: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> VisionSource:
        """All of the tower, the projector, the picture as the tower sees it, and CLIP's space where there is one."""
        return vision_source(
            encoded.tower,
            self.projector,
            lambda: self.clip_pixels.picture(encoded.prepared.clip_pixels),
            rows,
            self.clip_space,
            texts,
        )

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens show: (top, left, bottom, right) in its own pixels.

        Args:
            height, width: of the image.
        """
        return self.clip_pixels.box(height, width)

    def low_res_logits(self, states: Tensor, encoded: EncodedImage) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n, H]."""
        home = encoded.sam_embedding.device
        return sam_masks.low_res_logits(self.sam, encoded.sam_embedding, self.mask_projection(states.to(home)))

    def to_original_size(self, low_res: Tensor, encoded: EncodedImage) -> Tensor:
        """Mask logits float32 [n, H, W] at the image's size."""
        return sam_masks.to_original_size(low_res, encoded.prepared.sizes)
