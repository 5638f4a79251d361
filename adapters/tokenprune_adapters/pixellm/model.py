"""PixelLM on transformers' own classes: from an image and queries to masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.llava.prompt import IMAGE_ID
from tokenprune_adapters.pixellm.pixel_decoder import LEVELS, PixelDecoder
from tokenprune_adapters.pixellm.results import EncodedImage, PreparedImage
from tokenprune_adapters.pixellm.tower import GRID, grid_box, picture, run_pixel_tower
from tokenprune_adapters.segmentation.data import SegmenterInputs
from tokenprune_adapters.segmentation.image_encoding import in_turn
from tokenprune_adapters.segmentation.many.transfer import batched
from tokenprune_adapters.segmentation.sam import masks as sam_masks
from tokenprune_adapters.segmentation.segmenter import Segmenter


class PixelLMModel(Segmenter):
    """A loaded PixelLM; see `segment` for what it does. Every query is a batch row.

    A mask is asked for by six tokens, each a mask query of its own. Image tokens that show padding only are masked in
    the decoder: they are no image tokens for strategies, and positions count them.

    Args:
        mask_projector: from the tower's width to that of the features that masks are drawn on.
        pixel_decoder: draws the masks.
        square: side of the input that the tower was resized to, in pixels.
        parts: see `Segmenter`; coarser masks are made from what the projector reads.
    """

    prepared_type, encoded_type = PreparedImage, EncodedImage

    seg_tokens = tuple(f"[SEG{number}]" for number in range(6))
    """The six tokens of one mask: the first three for the coarser level, the others for the finer one."""
    forced_answer = f"{' '.join(seg_tokens)}."
    usual_answers = (forced_answer,)

    def __init__(
        self,
        *,
        mask_projector: nn.Module,
        pixel_decoder: PixelDecoder,
        square: int,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.mask_projector = mask_projector
        self.pixel_decoder = pixel_decoder
        self.square = square

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Pixels for the tower: the longest side resized to `square`, SAM's mean and deviation, zero-padded.

        Raises:
            InputError: not an image.
        """
        return PreparedImage(*sam_masks.preprocess(to_rgb(image), self.square))

    @in_turn
    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """See `Segmenter.encode_prepared`."""
        with stage("vision tower"):
            pixels = batched([image.pixels for image in images], next(self.tower.parameters()))
            towers = run_pixel_tower(self.tower, pixels, [image.sizes for image in images], self.select_layer)
            image_embeddings = self.projector(torch.cat([tower.grid_features for tower in towers]))
        with stage("mask encoder"):
            # level by level, image by image
            patches = [*(tower.patches.features for tower in towers), *(tower.early_features for tower in towers)]
            features = self.pixel_decoder.features(self.mask_projector(torch.cat(patches)))
            by_image = features.reshape(LEVELS, len(images), *features.shape[1:]).transpose(0, 1)
        encoded = []
        for parts in zip(images, towers, torch.split(image_embeddings, 1), by_image, strict=True):
            prepared, tower, embeddings, mask_features = parts
            valid = tower.visible.cells.reshape(1, -1)
            shown = None if bool(valid.all()) else valid
            encoded.append(EncodedImage(prepared, tower, embeddings, shown, mask_features))
        return encoded

    def picture(self, encoded: EncodedImage) -> Tensor:
        """What the visible cells show."""
        return picture(encoded.prepared.pixels, encoded.tower.visible)

    def image_cells(self, inputs: SegmenterInputs) -> tuple[Tensor, Tensor]:
        """The grid cells, which the holes would hide, and that all image tokens of a row are of one image."""
        sequence = inputs.sequence
        places = sequence.token_ids == IMAGE_ID  # padded cells too
        number = places.cumsum(1) - 1
        cells = torch.stack((number // GRID, number % GRID), -1)
        shown = sequence.image_tokens
        return cells.masked_fill(~shown[..., None], -1), torch.where(shown, 0, -1)

    def grid_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """What the visible cells divide: (top, left, bottom, right) in pixels of the image; the last cells may reach
        beyond its edges.

        Args:
            height, width: of the image.
        """
        config: Any = self.tower.config
        sizes = sam_masks.MaskSizes((height, width), sam_masks.resized_size(height, width, self.square), self.square)
        return grid_box(sizes, self.square // config.patch_size)

    def mask_embeddings(self, states: Tensor) -> Tensor:
        """Mask embeddings [n, 2, C], one per level, of mask-query states [n · 6, H].

        A level's embedding is the sum of its three tokens', each weighted 1/6, as in the authors' code.
        """
        embeddings = self.mask_projection(states)
        grouped = embeddings.reshape(-1, LEVELS, len(self.seg_tokens) // LEVELS, embeddings.shape[-1])
        fused: Tensor = grouped.sum(2) / len(self.seg_tokens)
        return fused

    def low_res_logits_of(
        self, states: Tensor, images: Sequence[EncodedImage], owners: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits [n, 128, 128] of mask-query states [n · 6, H], and no predicted IoU: PixelLM
        scores masks by their own logits, see `mask_scores`."""
        home = images[0].mask_features.device
        features, numbers = images[0].mask_features[None], None  # one image without a copy
        if len(images) > 1:
            features = torch.stack([image.mask_features for image in images])
            numbers = torch.tensor(owners, dtype=torch.int64, device=home)
        logits: Tensor = self.pixel_decoder(features, self.mask_embeddings(states.to(home)), numbers)
        return logits, logits.new_zeros(0)
