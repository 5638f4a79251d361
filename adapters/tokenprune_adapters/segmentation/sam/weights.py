"""SAM checkpoints with original tensor names, loaded into transformers' SAM; all sizes are read from the weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from tokenprune.errors import CheckpointError
from tokenprune_adapters.common.checkpoint import Checkpoint, Part

MASK_DECODER_EPS = 1e-5  # as in the original's two-way blocks; transformers' default is 1e-6
ENCODER_EPS = 1e-6
MASK_DECODER_HEADS = 8

# transformers' name -> the name in SAM's own checkpoints, applied in this order.
_RENAMES = (
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (
        r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)
_HEAD_LAYER = re.compile(
    r"((?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)(proj_in|proj_out|layers\.(\d+))\."
)


def original_name(name: str, iou_head_depth: int = 3) -> str:
    """The name in SAM's own checkpoints of a tensor of transformers' SamModel.

    Args:
        name: the name in SamModel, such as "vision_encoder.layers.0.layer_norm1.weight".
        iou_head_depth: number of layers of the mask decoder's IoU head; its other heads always have 3.
    """

    def head_layer(found: re.Match[str]) -> str:
        last = iou_head_depth - 1 if "iou" in found.group(1) else 2
        layer = (
            {"proj_in": 0, "proj_out": last}.get(found.group(2)) if found.group(3) is None else int(found.group(3)) + 1
        )
        return f"{found.group(1)}layers.{layer}."

    name = _HEAD_LAYER.sub(head_layer, name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def build_sam(checkpoint: Checkpoint, prefix: str, mask_decoder_heads: int | None = None) -> Part[SamModel]:
    """A SAM model on the meta device, with the sizes of a checkpoint, and the names of its tensors.

    Args:
        checkpoint: the checkpoint.
        prefix: prefix of SAM's tensor names ("model.visual_model.").
        mask_decoder_heads: number of attention heads of the mask decoder, which does not follow from shapes; by default
            SAM's 8.

    Raises:
        CheckpointError: a tensor that a size is read from is missing, or the shapes contradict each other.
    """
    heads = MASK_DECODER_HEADS if mask_decoder_heads is None else mask_decoder_heads
    inner = checkpoint.shape(prefix + "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", dims=2)[0]
    if not isinstance(heads, int) or heads < 1 or inner % heads:
        raise CheckpointError(
            f"{checkpoint.folder}: SAM's mask decoder, with attention of width {inner}, cannot have {heads!r} heads; "
            "set 'sam_mask_decoder_heads' in config.json to the number that the model was trained with"
        )
    config = sam_config(checkpoint, prefix, heads)
    decoder: Any = config.mask_decoder_config
    with torch.device("meta"):
        sam = SamModel(config)
    names = {name: prefix + original_name(name, decoder.iou_head_depth) for name in sam.state_dict()}
    return Part(sam.eval(), names)


def sam_config(checkpoint: Checkpoint, prefix: str, mask_decoder_heads: int) -> SamConfig:
    """The configuration, read from the shapes of a checkpoint."""
    sizes = Shapes(checkpoint, prefix)
    vision = _vision_config(sizes)
    decoder = _mask_decoder_config(sizes, mask_decoder_heads)
    mask_channels = sizes.of("prompt_encoder.mask_downscaling.3.weight", 4)[0]
    prompt: dict[str, Any] = {
        "hidden_size": sizes.of("prompt_encoder.no_mask_embed.weight", 2)[1],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "mask_input_channels": mask_channels,
        "num_point_embeddings": sizes.count("prompt_encoder.point_embeddings."),
        "layer_norm_eps": ENCODER_EPS,
    }
    return SamConfig(
        vision_config=SamVisionConfig(**vision).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(**prompt).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(**decoder).to_dict(),
    )


class Shapes:
    """Shapes of one SAM inside a checkpoint.

    Args:
        checkpoint: the checkpoint.
        prefix: prefix of the names of SAM's tensors; the methods take the rest of a name.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor; CheckpointError if it is missing or has another number of dimensions."""
        return self.checkpoint.shape(self.prefix + name, dims)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self.prefix + name in self.checkpoint

    def count(self, stem: str) -> int:
        """One more than the largest number that follows the stem in a name."""
        start = self.prefix + stem
        numbers = {name[len(start) :].split(".")[0] for name in self.checkpoint.names() if name.startswith(start)}
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    def refuse(self, problem: str) -> CheckpointError:
        """An error that tells what is wrong with this SAM."""
        return CheckpointError(f"{self.checkpoint.folder}: SAM under {self.prefix!r}: {problem}")


def _vision_config(sizes: Shapes) -> dict[str, Any]:
    width, channels, patch = sizes.of("image_encoder.patch_embed.proj.weight", 4)[:3]
    grid = sizes.of("image_encoder.pos_embed", 4)[1]
    depth = sizes.count("image_encoder.blocks.")
    block = "image_encoder.blocks.{}."
    spans = []
    for layer in range(max(depth, 1)):
        rows, head_size = sizes.of(block.format(layer) + "attn.rel_pos_h", 2)
        spans.append((rows + 1) // 2)
    windows = {span for span in spans if span != grid}
    if len(windows) > 1:
        raise sizes.refuse(
            f"attention windows of {sorted(windows)} patches found, expected one size besides the full {grid}"
        )
    if width % head_size:
        raise sizes.refuse(f"width {width} is not a multiple of the head size {head_size} of rel_pos_h")
    return {
        "hidden_size": width,
        "output_channels": sizes.of("image_encoder.neck.0.weight", 4)[0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_size,
        "num_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
        "layer_norm_eps": ENCODER_EPS,
        "qkv_bias": sizes.has(block.format(0) + "attn.qkv.bias"),
        "window_size": windows.pop() if windows else grid,
        "global_attn_indexes": [layer for layer, span in enumerate(spans) if span == grid],
        "num_pos_feats": sizes.of("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2)[1],
        "mlp_dim": sizes.of(block.format(0) + "mlp.lin1.weight", 2)[0],
    }


def _mask_decoder_config(sizes: Shapes, heads: int) -> dict[str, Any]:
    masks, width = sizes.of("mask_decoder.mask_tokens.weight", 2)
    inner = sizes.of("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    return {
        "hidden_size": width,
        "mlp_dim": sizes.of("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        "num_hidden_layers": sizes.count("mask_decoder.transformer.layers."),
        "num_attention_heads": heads,
        "attention_downsample_rate": max(width // inner, 1),
        "num_multimask_outputs": masks - 1,
        "iou_head_depth": sizes.count("mask_decoder.iou_prediction_head.layers."),
        "iou_head_hidden_dim": sizes.of("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
        "layer_norm_eps": MASK_DECODER_EPS,
    }
