"""SAM 2 with the authors' tensor names, on transformers' `Sam2Model`, and its masks of one picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Sam2Config, Sam2Model
from transformers.models.sam2.configuration_sam2 import (
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

from tokenprune_adapters.common.checkpoint import Checkpoint, Part
from tokenprune_adapters.segmentation.sam.weights import Shapes

PREFIX = "grounding_encoder.sam2_model."
OF_VIDEOS = ("memory_attention.", "memory_encoder.", "obj_ptr_proj.", "mask_downsample.")
OF_VIDEOS_WHOLE = ("maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr")
TRUNK = "sam2_trunk"
LARGE: dict[str, Any] = {"image_size": 1024, "heads": 2, "windows": [8, 4, 16, 8], "global_blocks": [23, 33, 43]}
"""What does not follow from the shapes of Hiera-L, the trunk of every release."""
LARGE_BLOCKS, LARGE_WIDTH = [2, 6, 36, 4], 144
HEADS, LAYERS = 8, 2  # of the mask decoder
MASKS_AT_ONCE = 16  # limits memory: the mask decoder copies the image embedding for each mask

# transformers' name -> the authors', applied in this order
_RENAMES = (
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.trunk.patch_embed.proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (
        r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding$",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^prompt_encoder\.point_embed\.", "sam_prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "sam_prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "sam_prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "sam_prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "sam_prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "sam_prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling.3."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.proj_in\.", ".mlp.layers.0."),
    (r"\.mlp\.proj_out\.", ".mlp.layers.1."),
)
_HEAD_LAYER = re.compile(
    r"((?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.)(proj_in|proj_out|layers\.(\d+))\."
)


class Sam2Features(NamedTuple):
    """SAM 2's features of B pictures, with s patches each way at the coarsest level.

    Args:
        fine: [B, C / 8, 4s, 4s], as the mask decoder adds them.
        middle: [B, C / 4, 2s, 2s], likewise.
        coarse: [B, C, s, s], the image embedding, as of a picture that no other precedes.
    """

    fine: Tensor
    middle: Tensor
    coarse: Tensor


def original_name(name: str, iou_head_depth: int = 3) -> str:
    """The authors' name, as `stored.Rearranged` tells it, of a tensor of transformers' Sam2Model.

    Args:
        name: the name in Sam2Model, such as "vision_encoder.backbone.blocks.0.layer_norm1.weight".
        iou_head_depth: number of layers of the mask decoder's IoU head; its other heads always have 3.
    """

    def head_layer(found: re.Match[str]) -> str:
        last = iou_head_depth - 1 if "iou" in found[1] else 2
        layer = {"proj_in": 0, "proj_out": last}.get(found[2]) if found[3] is None else int(found[3]) + 1
        return f"{found[1]}layers.{layer}."

    name = _HEAD_LAYER.sub(head_layer, name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def of_videos(name: str) -> bool:
    """Whether a tensor of a checkpoint serves the tracking of objects in videos alone; these are left out."""
    own = name.removeprefix(PREFIX)
    return own != name and (own.startswith(OF_VIDEOS) or own in OF_VIDEOS_WHOLE)


def build_sam2(
    checkpoint: Checkpoint, config: dict[str, Any], attn_implementation: str | None = None
) -> Part[Sam2Model]:
    """A SAM 2 on the meta device, and the names of its tensors. Sizes are read from the weights.

    Args:
        checkpoint: rearranged, see `stored.Rearranged`.
        config: config.json. What does not follow from shapes is as in Hiera-L, the only trunk of the authors' code;
            another one needs `"sam2_trunk"` in it, with the keys of `LARGE`, and for the mask decoder
            `"sam_mask_decoder_heads"` if it has not 8 heads (ours).
        attn_implementation: as in transformers.

    Raises:
        CheckpointError: a tensor that a size is read from is missing, or the sizes contradict each other.
    """
    sizes = Shapes(checkpoint, PREFIX)
    vision = _vision_config(sizes, _trunk(sizes, config))
    decoder = _mask_decoder_config(sizes, config.get("sam_mask_decoder_heads", HEADS))
    backbone: Any = vision.backbone_config
    channels = sizes.of("sam_prompt_encoder.mask_downscaling.3.weight", 4)[0]
    prompt = Sam2PromptEncoderConfig(
        hidden_size=decoder.hidden_size,
        image_size=backbone.image_size[0],
        patch_size=16,
        mask_input_channels=channels,
        num_point_embeddings=4,  # points inside and outside, and two corners of a box
    )
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    whole = Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    with torch.device("meta"):
        sam = Sam2Model._from_config(whole, **extra)
    names = {name: PREFIX + original_name(name, decoder.iou_head_depth) for name in sam.state_dict()}
    return Part(sam.eval(), names)


def _trunk(sizes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the trunk that do not follow from shapes."""
    given = config.get(TRUNK)
    if given is None:
        found = _blocks(sizes), sizes.of("image_encoder.trunk.patch_embed.proj.weight", 4)[0]
        if found != (LARGE_BLOCKS, LARGE_WIDTH):
            raise sizes.refuse(
                f"a trunk of stages {found[0]} and width {found[1]} found, expected Hiera-L's {LARGE_BLOCKS} and "
                f"{LARGE_WIDTH}; for another one set {TRUNK!r} in config.json to its {', '.join(LARGE)}"
            )
        return LARGE
    if not isinstance(given, dict) or given.keys() != LARGE.keys() or not _like_large(given):
        raise sizes.refuse(
            f"{TRUNK} {given!r} found in config.json, expected an object with {', '.join(LARGE)}, as in {LARGE}"
        )
    return {name: given[name] for name in LARGE}


def _like_large(given: dict[str, Any]) -> bool:
    """Whether the values are whole numbers, or lists of them, as those of `LARGE`."""
    for name, wanted in LARGE.items():
        numbers = given[name] if isinstance(wanted, list) else [given[name]]
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            return False
    return all(number > 0 for number in (given["image_size"], given["heads"], *given["windows"]))


def _blocks(sizes: Shapes) -> list[int]:
    """Blocks of each stage; a stage begins with a block that changes the width."""
    block = "image_encoder.trunk.blocks."
    total = sizes.count(block)
    starts = [0, *(number for number in range(1, total) if sizes.has(f"{block}{number}.proj.weight")), total]
    return [after - before for before, after in pairwise(starts)]


def _vision_config(sizes: Shapes, trunk: dict[str, Any]) -> Sam2VisionConfig:
    stem = "image_encoder.trunk."
    blocks = _blocks(sizes)
    starts = [sum(blocks[:stage]) for stage in range(len(blocks))]
    if len(blocks) != 4 or len(trunk["windows"]) != 4:
        raise sizes.refuse(f"a trunk of {len(blocks)} stages, with {len(trunk['windows'])} windows, expected 4")
    widths = [sizes.of(f"{stem}blocks.{start}.attn.proj.weight", 2)[0] for start in starts]
    heads = [trunk["heads"] * 2**stage for stage in range(4)]
    side, window = trunk["image_size"], sizes.of(stem + "pos_embed_window", 4)[2]
    if window != trunk["windows"][0]:
        raise sizes.refuse(f"the first window is of {window} patches, expected {trunk['windows'][0]}")
    if side % (4 * window) or side % 32:
        raise sizes.refuse(f"pictures of {side} pixels found, expected a multiple of 32 and of {4 * window}")
    if any(width % count for width, count in zip(widths, heads, strict=True)):
        raise sizes.refuse(f"stages of widths {widths} cannot have {heads} heads")
    backbone = Sam2HieraDetConfig(
        hidden_size=widths[0],
        num_attention_heads=heads[0],
        image_size=[side, side],
        window_positional_embedding_background_size=list(sizes.of(stem + "pos_embed", 4)[2:]),
        blocks_per_stage=blocks,
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=heads,
        window_size_per_stage=list(trunk["windows"]),
        global_attention_blocks=list(trunk["global_blocks"]),
        mlp_ratio=sizes.of(stem + "blocks.0.mlp.layers.0.weight", 2)[0] / widths[0],
    )
    return Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[side // step, side // step] for step in (4, 8, 16)],
        fpn_hidden_size=sizes.of("image_encoder.neck.convs.0.conv.weight", 4)[0],
    )


def _mask_decoder_config(sizes: Shapes, heads: Any) -> Sam2MaskDecoderConfig:
    stem = "sam_mask_decoder."
    masks, width = sizes.of(stem + "mask_tokens.weight", 2)
    inner = sizes.of(stem + "transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or inner % heads or width % heads:
        raise sizes.refuse(
            f"a mask decoder with attention of widths {width} and {inner} cannot have {heads!r} heads; set "
            "'sam_mask_decoder_heads' in config.json to the number that the model was trained with"
        )
    if (layers := sizes.count(stem + "transformer.layers.")) != LAYERS:
        raise sizes.refuse(f"a mask decoder of {layers} layers found, expected {LAYERS}, which is all that SAM 2 has")
    return Sam2MaskDecoderConfig(
        hidden_size=width,
        mlp_dim=sizes.of(stem + "transformer.layers.0.mlp.layers.0.weight", 2)[0],
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        attention_downsample_rate=max(width // inner, 1),
        num_multimask_outputs=masks - 1,
        iou_head_depth=sizes.count(stem + "iou_prediction_head.layers."),
        iou_head_hidden_dim=sizes.of(stem + "iou_prediction_head.layers.0.weight", 2)[0],
    )


# masks ----------------------------------------------------------------------------------------------------------------


def embed_pictures(sam: Sam2Model, pixels: Tensor) -> Sam2Features:
    """SAM 2's features of pictures [B, 3, side, side], one at a time, since its early layers have many positions."""
    decoder = sam.mask_decoder
    levels = [sam.vision_encoder(part).fpn_hidden_states for part in torch.split(pixels, 1)]
    fine, middle, coarse = (torch.cat(level) if len(level) > 1 else level[0] for level in zip(*levels, strict=True))
    alone = coarse + sam.no_memory_embedding.reshape(1, -1, 1, 1)
    return Sam2Features(decoder.conv_s0(fine), decoder.conv_s1(middle), alone)


def low_res_logits(
    sam: Sam2Model, pictures: Sequence[Sam2Features], prompts: Tensor, owners: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """One mask for each prompt: of three candidates, the one whose predicted IoU is highest.

    A prompt stands behind two places that SAM 2 has for points, here empty. Whether the object is there at all, which
    SAM 2 also predicts, is not asked, as in the authors' code.

    Args:
        sam: the model.
        pictures: features of each picture, B = 1.
        prompts: [n, C].
        owners: the picture of each prompt.

    Returns:
        Mask logits [n, 4s, 4s] and predicted IoU [n].
    """
    like = pictures[0].coarse
    side = 4 * like.shape[-1]
    if not len(prompts):
        return like.new_zeros((0, side, side)), like.new_zeros(0)
    positions = sam.get_image_wide_positional_embeddings().to(like)
    nowhere = like.new_zeros((1, 1, 1, 2))
    empty, dense = sam.prompt_encoder(
        input_points=nowhere,
        input_labels=torch.full((1, 1, 1), -1, dtype=torch.int32, device=like.device),
        input_boxes=None,
        input_masks=None,
    )
    masks, scores = [], []
    for start in range(0, len(prompts), MASKS_AT_ONCE):
        chunk = prompts[start : start + MASKS_AT_ONCE].to(like)
        # one picture of several prompts, or a picture for each prompt
        own = [pictures[owner] for owner in owners[start : start + MASKS_AT_ONCE]]
        shared = all(one is own[0] for one in own)
        used = own[:1] if shared else own
        spoken = chunk[None, :, None] if shared else chunk[:, None, None]
        sparse = torch.cat((empty.to(like).expand(*spoken.shape[:2], -1, -1), spoken), 2)
        fine, middle, coarse = (torch.cat(level) for level in zip(*used, strict=True))
        candidates, quality, *_ = sam.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=positions.expand(len(used), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.to(like).expand(len(used), -1, -1, -1),
            multimask_output=True,
            high_resolution_features=[fine, middle],
        )
        flat, quality = candidates.flatten(0, 1), quality.flatten(0, 1)
        best = quality.argmax(-1)
        rows = torch.arange(len(best), device=best.device)
        masks.append(flat[rows, best])
        scores.append(quality[rows, best])
    return torch.cat(masks), torch.cat(scores)
