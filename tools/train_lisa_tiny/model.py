"""The parts of lisa-tiny: transformers' own CLIP, Llama and SAM classes in small sizes. All sizes are ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

IMAGE_SIZE = 256
GRID = 16
WIDTH = 192
CHANNELS = 64
MASK_DECODER_HEADS = 4
NUM_SHAPES = NUM_COLOURS = 8
NUM_SIZES = 2

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


def build_tower() -> CLIPVisionModel:
    """CLIP: 256 patches of 16 pixels; the features are the input of the last of five layers."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // GRID,
        hidden_act="quick_gelu",
    )
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] += position_code()
    return tower


def position_code(scale: float = 1.0) -> Tensor:
    """SAM's encoding of each patch's centre, turned into the tower's width, [256, width].

    The position table starts with it, so that features say where they are from the first step on.
    """
    patch = IMAGE_SIZE // GRID
    grid = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), -1).flatten(0, 1)
    turn = torch.linalg.qr(torch.randn(WIDTH, CHANNELS, generator=torch.Generator().manual_seed(4)))[0]
    return scale * encode_points((grid * patch + patch / 2).float()) @ turn.T


def build_decoder(vocabulary: int) -> LlamaForCausalLM:
    """Llama: 12 layers, so that pruning schedules have room."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def build_sam() -> SamModel:
    """SAM: 32 x 32 embedding, so that small objects cover several cells; masks of 128 x 128."""
    vision = SamVisionConfig(
        hidden_size=64,
        output_channels=CHANNELS,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        window_size=8,
        global_attn_indexes=[1],
        num_pos_feats=CHANNELS // 2,
        mlp_dim=192,
        use_rel_pos=False,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=CHANNELS, image_size=IMAGE_SIZE, patch_size=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=CHANNELS,
        mlp_dim=256,
        num_attention_heads=MASK_DECODER_HEADS,
        iou_head_hidden_dim=CHANNELS,
        layer_norm_eps=1e-5,
    )
    sam = SamModel(
        SamConfig(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompt.to_dict(),
            mask_decoder_config=decoder.to_dict(),
        )
    )
    with torch.no_grad():
        sam.shared_image_embedding.positional_embedding.copy_(position_table())
        for embed in sam.prompt_encoder.point_embed:
            embed.weight.zero_()  # and frozen: a point's prompt is its positional encoding, known before SAM is trained
    sam.prompt_encoder.shared_embedding.positional_embedding = sam.shared_image_embedding.positional_embedding
    sam.shared_image_embedding.positional_embedding.requires_grad_(False)
    sam.prompt_encoder.point_embed.requires_grad_(False)
    return sam


def position_table() -> Tensor:
    """Frequencies of SAM's positional encoding, [2, channels / 2]; scale 1, as in the original."""
    return torch.randn(2, CHANNELS // 2, generator=torch.Generator().manual_seed(3))


def encode_points(points: Tensor) -> Tensor:
    """What `point_prompts` gives, without a model."""
    angles = 2 * torch.pi * (2 * (points + 0.5) / IMAGE_SIZE - 1) @ position_table()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def point_prompts(sam: SamModel, points: Tensor) -> Tensor:
    """SAM's embedding of foreground points: [..., 2] (x, y in pixels) to [..., channels]. No padding point."""
    encoder = sam.prompt_encoder
    return encoder.shared_embedding((points + 0.5) / IMAGE_SIZE) + encoder.point_embed[1].weight[0]


def decode_masks(sam: SamModel, embedding: Tensor, prompts: Tensor) -> Tensor:
    """Mask logits [B, n, 128, 128] of prompts [B, n, channels] on image embeddings [B, channels, 32, 32]."""
    dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(embedding)
    positions = sam.get_image_wide_positional_embeddings().to(embedding.dtype).repeat(len(embedding), 1, 1, 1)
    masks, _ = sam.mask_decoder(
        image_embeddings=embedding,
        image_positional_embeddings=positions,
        sparse_prompt_embeddings=prompts[:, :, None],
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return masks[:, :, 0]


class TowerHeads(nn.Module):
    """Auxiliary heads used in training only (ours): what covers a patch and whether
    nothing else has its colour or shape, and what colours and shapes an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(WIDTH, NUM_SHAPES + 1 + NUM_COLOURS + 1 + NUM_SIZES + 1 + 2 + 2)
        self.centre = nn.Linear(WIDTH, CHANNELS)
        self.image = nn.Linear(WIDTH, NUM_SHAPES + NUM_COLOURS)

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        sizes = [NUM_SHAPES + 1, NUM_COLOURS + 1, NUM_SIZES + 1, 2, 2]
        return [*self.patch(features).split(sizes, dim=-1), self.centre(features)], self.image(pooled)


def clip_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to CLIP's input, float32 [B, 3, H, W]."""
    scaled = images.float() / 255
    return ((scaled - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2).contiguous()


def sam_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to SAM's input, float32 [B, 3, H, W]."""
    return ((images.float() - torch.tensor(SAM_MEAN)) / torch.tensor(SAM_STD)).permute(0, 3, 1, 2).contiguous()


def tower_features(tower: CLIPVisionModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features [B, 256, width] (hidden_states[-2] without CLS) and the pooled CLS output [B, width]."""
    output = tower(clip_pixels(images), output_hidden_states=True)
    return output.hidden_states[-2][:, 1:], output.pooler_output
