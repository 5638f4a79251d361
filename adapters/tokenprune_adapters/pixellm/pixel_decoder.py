"""PixelLM's pixel decoder: masks of two levels, drawn on CLIP features by SAM's two-way transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import (
    SamFeedForward,
    SamLayerNorm,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamTwoWayTransformer,
)

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint, Part
from tokenprune_adapters.segmentation.sam.masks import MASKS_AT_ONCE
from tokenprune_adapters.segmentation.sam.weights import (
    ENCODER_EPS,
    MASK_DECODER_EPS,
    MASK_DECODER_HEADS,
    original_name,
)

LEVELS = 2
MASK_SIDE = 128  # both levels are brought to this size before they are added
PREFIX = "model."
NECK = PREFIX + "image_feature_neck."


class MaskDecoder(nn.Module):
    """The mask decoder, one level at a time; parameters are named as in the checkpoints where SAM's parts allow it.

    Args:
        config: of the two-way transformers and the heads.
        positions: of the random Fourier features of positions.
    """

    def __init__(self, config: SamMaskDecoderConfig, positions: SamVisionConfig) -> None:
        super().__init__()
        width, masks = config.hidden_size, config.num_multimask_outputs + 1
        narrow = width // 8
        self.transformer = nn.ModuleList(SamTwoWayTransformer(config) for _ in range(LEVELS))
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.output_upscaling = nn.Sequential(nn.ConvTranspose2d(width, narrow, 2, 2), _norm(narrow), nn.GELU())
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), _norm(width), nn.GELU())
        self.pe1 = SamPositionalEmbedding(positions)
        # Of the heads only the first mask's is used; the others are there because the checkpoints hold them.
        self.output_hypernetworks_mlps = nn.ModuleList(SamFeedForward(width, width, narrow, 3) for _ in range(masks))
        self.iou_prediction_head = SamFeedForward(width, config.iou_head_hidden_dim, masks, config.iou_head_depth)

    def forward(
        self, level: int, features: Tensor, positions: Tensor, prompts: Tensor, dense: Tensor, previous: Tensor | None
    ) -> Tensor:
        """Mask logits [n, h', w'] of one level.

        Args:
            level: 0, or 1, which works at twice the resolution under the masks of level 0.
            features: [1, C, h, w], or [n, C, h, w] of the image of each mask.
            positions: [1, C, h, w], used by level 0; level 1 has its own.
            prompts: [n, C], one per mask.
            dense: [1, C, 1, 1], added to every place.
            previous: [n, 2h, 2w], logits of level 0.
        """
        count, width = prompts.shape
        fixed = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((fixed.expand(count, -1, -1), prompts[:, None]), 1) + self.level_embed.weight[level]
        image = features.expand(count, -1, -1, -1)
        if previous is not None:
            image = self.upsample_2x(features) * (previous[:, None].sigmoid() + 1)
            positions = place_codes(self.pe1, image.shape[-1]).to(image)
        image = image + dense
        side = image.shape[-1]
        states, image = self.transformer[level](
            point_embeddings=tokens[:, None],
            image_embeddings=image,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        image = image[:, 0].transpose(1, 2).reshape(count, width, side, side)
        upscaled = self.output_upscaling(image)
        weights = self.output_hypernetworks_mlps[0](states[:, 0, 1])
        masks: Tensor = torch.einsum("nc,nchw->nhw", weights, upscaled)
        return masks


class PixelDecoder(nn.Module):
    """From tower features and mask embeddings to low-resolution mask logits.

    Args:
        config: SAM's configuration, of which the prompt encoder and the mask decoder count.
        feature_width: of the projected features.
    """

    def __init__(self, config: SamConfig, feature_width: int) -> None:
        super().__init__()
        vision: Any = config.vision_config
        prompt: Any = config.prompt_encoder_config
        decoder: Any = config.mask_decoder_config
        width = prompt.hidden_size
        self.side = vision.image_size // vision.patch_size
        self.image_feature_neck = nn.Sequential(
            nn.Conv2d(feature_width, width, 1, bias=False),
            _norm(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            _norm(width),
        )
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = MaskDecoder(decoder, vision)

    def features(self, patches: Tensor) -> Tensor:
        """Mask features [k, C, side, side] of projected patch features [k, side², H]: levels of any images."""
        grids = patches.transpose(1, 2)
        grids = grids.reshape(*grids.shape[:2], self.side, self.side)
        found: Tensor = self.image_feature_neck(grids)
        return found

    def levels(self, features: Tensor, embeddings: Tensor, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mask logits of both levels, [n, 2·side, 2·side] and [n, 4·side, 4·side].

        Args:
            features: [B, LEVELS, C, side, side], of B images.
            embeddings: [n, LEVELS, C], one mask embedding per level.
            owners: int64 [n], the image of each mask; None if there is one image.
        """
        positions = place_codes(self.prompt_encoder.shared_embedding, self.side).to(features)
        # By keyword: torch's module tracker, which counts FLOPs, trips over views of parameters among the others.
        fixed = {"positions": positions, "dense": self.prompt_encoder.no_mask_embed.weight[..., None, None]}
        coarse, fine = [], []
        for start in range(0, len(embeddings), MASKS_AT_ONCE):
            chunk = embeddings[start : start + MASKS_AT_ONCE]
            # one image serves all masks without copies of it
            of_masks = features if owners is None else features[owners[start : start + MASKS_AT_ONCE]]
            low, high = of_masks.unbind(1)
            first = self.mask_decoder(level=0, features=low, prompts=chunk[:, 0], previous=None, **fixed)
            coarse.append(first)
            second = self.mask_decoder(level=1, features=high, prompts=chunk[:, 1], previous=first, **fixed)
            fine.append(second)
        if not coarse:
            none = features.new_zeros(0, 2 * self.side, 2 * self.side)
            return none, none.new_zeros(0, 4 * self.side, 4 * self.side)
        return torch.cat(coarse), torch.cat(fine)

    def forward(self, features: Tensor, embeddings: Tensor, owners: Tensor | None = None) -> Tensor:
        """Low-resolution mask logits [n, MASK_SIDE, MASK_SIDE], the mean of both levels; arguments as for `levels`."""
        total = features.new_zeros(len(embeddings), MASK_SIDE, MASK_SIDE)
        for logits in self.levels(features, embeddings, owners):
            if len(logits):
                logits = logits[:, None].float()
                logits = functional.interpolate(logits, (MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)
                total = total + logits[:, 0].to(total) / LEVELS
        return total


def place_codes(embedding: nn.Module, side: int) -> Tensor:
    """Codes [1, C, side, side] of the centres of a grid's cells, given as (x, y) in 0 … 1."""
    table: Any = embedding.positional_embedding
    centres = (torch.arange(side, device=table.device, dtype=table.dtype) + 0.5) / side
    codes: Tensor = embedding(torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1))
    return codes.permute(2, 0, 1)[None]


def build_pixel_decoder(
    checkpoint: Checkpoint, square: int, patch: int, feature_width: int, heads: int | None = None
) -> Part[PixelDecoder]:
    """A pixel decoder on the meta device, of the sizes of a checkpoint, and the names to fill it from.

    Args:
        checkpoint: where the weights are.
        square, patch: sides of the tower's input and of its patches, in pixels.
        feature_width: of the features that the neck reads.
        heads: attention heads of the mask decoder, which no shape shows; SAM's 8 by default.

    Raises:
        CheckpointError: tensors are missing, or the checkpoint has another number of levels or sizes that do not fit.
    """
    config = _sam_config(checkpoint, square, patch, heads or MASK_DECODER_HEADS)
    try:
        with torch.device("meta"):
            decoder = PixelDecoder(config, feature_width)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {heads or MASK_DECODER_HEADS} attention heads do not fit the pixel decoder "
            f"({error}); "
            "say their number as sam_mask_decoder_heads in config.json"
        ) from error
    heads_config: Any = config.mask_decoder_config
    depth = heads_config.iou_head_depth
    return Part(decoder.eval(), {name: stored_name(name, depth) for name in decoder.state_dict()})


def stored_name(name: str, iou_head_depth: int = 3) -> str:
    """The name that a tensor of `PixelDecoder` has in checkpoints; see `segmentation.sam.weights.original_name`."""
    if name.endswith("pe1.positional_embedding"):
        return PREFIX + "mask_decoder.pe1.positional_encoding_gaussian_matrix"
    return PREFIX + (name if name.startswith("image_feature_neck.") else original_name(name, iou_head_depth))


def _sam_config(checkpoint: Checkpoint, square: int, patch: int, heads: int) -> SamConfig:
    def shape(name: str) -> tuple[int, ...]:
        return checkpoint.shape(PREFIX + name, 2)

    def count(stem: str) -> int:
        start = PREFIX + stem
        found = {name[len(start) :].split(".")[0] for name in checkpoint.names() if name.startswith(start)}
        return 1 + max((int(number) for number in found if number.isdigit()), default=-1)

    levels, width = shape("mask_decoder.level_embed.weight")
    if (levels, count("mask_decoder.transformer.")) != (LEVELS, LEVELS):
        raise CheckpointError(
            f"{checkpoint.folder}: the pixel decoder has {levels} levels and {count('mask_decoder.transformer.')} "
            f"transformers, expected {LEVELS} of each; other kinds of PixelLM are not supported"
        )
    first = "mask_decoder.transformer.0."
    features = shape("mask_decoder.pe1.positional_encoding_gaussian_matrix")[1]
    channels = checkpoint.shape(PREFIX + "prompt_encoder.mask_downscaling.3.weight", 4)[0]
    decoder = SamMaskDecoderConfig(
        hidden_size=width,
        mlp_dim=shape(first + "layers.0.mlp.lin1.weight")[0],
        num_hidden_layers=count(first + "layers."),
        num_attention_heads=heads,
        attention_downsample_rate=max(width // shape(first + "final_attn_token_to_image.q_proj.weight")[0], 1),
        num_multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
        iou_head_depth=count("mask_decoder.iou_prediction_head.layers."),
        iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
        layer_norm_eps=MASK_DECODER_EPS,
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=width,
        image_size=square,
        patch_size=patch,
        mask_input_channels=channels,
        num_point_embeddings=count("prompt_encoder.point_embeddings."),
        layer_norm_eps=ENCODER_EPS,
    )
    vision = SamVisionConfig(image_size=square, patch_size=patch, num_pos_feats=features)
    config = SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=prompt.to_dict(),
        mask_decoder_config=decoder.to_dict(),
    )
    attending: Any = config.mask_decoder_config
    attending._attn_implementation = "sdpa"
    return config


def _norm(width: int) -> SamLayerNorm:
    return SamLayerNorm(width, eps=ENCODER_EPS, data_format="channels_first")
