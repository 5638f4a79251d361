"""Segmentation models with a CLIP tower for the decoder and SAM for the masks: LISA and GLaMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import SamModel

from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.clip.tower import ClipPixels
from tokenprune_adapters.llava.vision import run_tower
from tokenprune_adapters.segmentation.data import EncodedImage, PreparedImage
from tokenprune_adapters.segmentation.image_encoding import in_turn
from tokenprune_adapters.segmentation.many.transfer import batched
from tokenprune_adapters.segmentation.sam import masks as sam_masks
from tokenprune_adapters.segmentation.segmenter import Segmenter


class SamSegmenter(Segmenter):
    """A model that encodes the image with CLIP for its decoder and with SAM for its masks.

    Args:
        sam: encodes the image a second time and decodes the masks.
        clip_pixels: the tower's image processor.
        parts: see `Segmenter`.
    """

    prepared_type, encoded_type = PreparedImage, EncodedImage

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
    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See `Segmenter.encode_prepared`."""
        with stage("vision tower"):
            weight = next(self.tower.parameters())
            run = run_tower(self.tower, batched([image.clip_pixels for image in images], weight), self.select_layer)
            image_embeddings = self.projector(run.features)
        with stage("mask encoder"):
            pixels = batched([image.sam_pixels for image in images], run.features)
            sam_embeddings = sam_masks.embed_image(self.sam, pixels)
        parts = zip(
            images, run.each_image(), torch.split(image_embeddings, 1), torch.split(sam_embeddings, 1), strict=True
        )
        return [EncodedImage(*part) for part in parts]

    def picture(self, encoded: EncodedImage) -> Tensor:
        """The resized and cropped image in the tower's input."""
        return self.clip_pixels.picture(encoded.prepared.clip_pixels)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of an image that the image tokens cover: (top, left, bottom, right) in pixels of the image.

        Args:
            height, width: of the image.
        """
        return self.clip_pixels.box(height, width)

    def low_res_logits_of(
        self, states: Tensor, images: Sequence[EncodedImage], owners: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, h, w] and predicted IoU [n] of mask-query states [n, H]."""
        home = images[0].sam_embedding.device
        prompts = self.mask_projection(states.to(home))
        if len(images) == 1:  # without a copy of its embedding
            return sam_masks.low_res_logits(self.sam, images[0].sam_embedding, prompts)
        numbers = torch.tensor(owners, dtype=torch.int64, device=home)
        return sam_masks.low_res_logits(
            self.sam, torch.cat([image.sam_embedding for image in images]), prompts, numbers
        )
