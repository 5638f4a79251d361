"""Segmentation models with a CLIP tower for the decoder and SAM for the masks: LISA and GLaMM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import SamModel

from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.clip.tower import ClipPixels
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_adapters.segmentation import sam_masks
from tokenprune_adapters.segmentation.data import EncodedImage, PreparedImage
from tokenprune_adapters.segmentation.segmenter import Segmenter, in_turn


class SamSegmenter(Segmenter):
    """A model that encodes the image with CLIP for its decoder and with SAM for its masks.

    Args:
        sam: encodes the image a second time and decodes the masks.
        clip_pixels: the tower's image processor.
        parts: see `Segmenter`.
    """

    def __init__(self, *, sam: SamModel, clip_pixels: ClipPixels, **parts: Any) -> None:
        super().__init__(**parts)
        self.sam = sam
        self.clip_pixels = clip_pixels

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Pixels for both towers.

        Raises:
            InputError: not an image.
        """
        rgb = to_rgb(image)
        config: Any = self.sam.config.vision_config
        pixels, sizes = sam_masks.preprocess(rgb, config.image_size)
        return PreparedImage(self.clip_pixels(rgb), pixels, sizes)

    @in_turn
    def encode_image(self, image: ImageInput | PreparedImage | EncodedImage) -> EncodedImage:
        """Tower features, image tokens and SAM's image embedding. An encoded image is returned unchanged.

        Raises:
            InputError: not an image.
        """
        if isinstance(image, EncodedImage):
            return image
        with stage("preprocess"):
            prepared = image if isinstance(image, PreparedImage) else self.prepare_image(image)
        with stage("vision tower"):
            tower = run_tower(self.tower, prepared.clip_pixels, self.select_layer)
            image_embeddings = self.projector(tower.features)
        with stage("mask encoder"):
            sam_embedding = sam_masks.embed_image(self.sam, prepared.sam_pixels.to(tower.features))
        return EncodedImage(prepared, tower, image_embeddings, sam_embedding)

    def picture(self, encoded: EncodedImage) -> Tensor:
        """The resized and cropped image in the tower's input."""
        return self.clip_pixels.picture(encoded.prepared.clip_pixels)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens cover: (top, left, bottom, right) in pixels of the image.

        Args:
            height, width: of the image.
        """
        return self.clip_pixels.box(height, width)

    def low_res_logits(self, states: Tensor, encoded: EncodedImage) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n, H]."""
        home = encoded.sam_embedding.device
        return sam_masks.low_res_logits(self.sam, encoded.sam_embedding, self.mask_projection(states.to(home)))
