"""What image processors give for pictures and videos, and the ids that stand for them, for `vlm_families`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import vlm_configs as configs
from PIL import Image
from torch import Tensor
from vlm_configs import CELL, CROP, END, FAKE, GLOBAL, IMAGE, PAD, PATCH, SMALL_CROP, START, TEXT, VIDEO

Pictures = list[list[Image.Image]]  # by batch row
AttentionCall = tuple[
    dict[str, Tensor], list[list[list[int]]]
]  # model inputs; per row and image, the ids that stand for it


def picture(height: int, width: int, draw: torch.Generator) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=draw).numpy().astype(np.uint8))


def text_ids(count: int, draw: torch.Generator) -> list[int]:
    return torch.randint(TEXT.start, TEXT.stop, (count,), generator=draw).tolist()


def padded(ids: list[list[int]], padding: str) -> dict[str, Tensor]:
    width = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        fill, ones = [PAD] * (width - len(row)), [1] * len(row)
        rows.append(fill + row if padding == "left" else row + fill)
        masks.append([0] * len(fill) + ones if padding == "left" else ones + [0] * len(fill))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def spans_of(pictures: Pictures, counts: Sequence[int], wrap: Callable[[int], list[int]]) -> list[list[list[int]]]:
    """Ids for the pictures of each row, where `counts` runs over all pictures of the batch."""
    left = iter(counts)
    return [[wrap(next(left)) for _ in row] for row in pictures]


def _processor(name: str) -> Any:
    """The image processor that needs no torchvision; older releases call it by the plain name."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def plain(count: int) -> list[int]:
    return [IMAGE] * count


def wrapped(count: int) -> list[int]:
    return [START, *[IMAGE] * count, END]


def _flat(pictures: Pictures) -> list[Image.Image]:
    return [picture for row in pictures for picture in row]


def fixed(processor: str, side: int, count: int, wrap: Callable[[int], list[int]] = plain, **options: Any) -> Any:
    """One square crop, `count` tokens."""

    def see(config: Any, pictures: Pictures) -> AttentionCall:
        make = _processor(processor)(size={"height": side, "width": side}, **options)
        pixels = make(images=_flat(pictures), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, spans_of(pictures, [count] * len(pixels), wrap)

    return see


def see_llava_next(config: Any, pictures: Pictures) -> AttentionCall:
    size = {"height": SMALL_CROP, "width": SMALL_CROP}
    make = _processor("LlavaNextImageProcessor")(
        size={"shortest_edge": SMALL_CROP}, crop_size=size, image_grid_pinpoints=configs.PINPOINTS
    )
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    pack = transformers.LlavaNextModel.pack_image_features
    crops = [_crops(size) for size in seen["image_sizes"]]
    return seen, spans_of(pictures, _lengths(pack, config, crops, seen["image_sizes"], "default"), plain)


def see_llava_onevision(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("LlavaOnevisionImageProcessor")(
        size={"height": SMALL_CROP, "width": SMALL_CROP}, image_grid_pinpoints=configs.PINPOINTS
    )
    seen = dict(make(images=pictures, return_tensors="pt"))
    alone = [count == 1 for count in seen["batch_num_images"].tolist() for _ in range(count)]
    crops = [_crops(size) if one else 1 for size, one in zip(seen["image_sizes"], alone, strict=True)]
    pack = transformers.LlavaOnevisionModel.pack_image_features
    ratio = {"vision_aspect_ratio": config.vision_aspect_ratio}
    return seen, spans_of(pictures, _lengths(pack, config, crops, seen["image_sizes"], **ratio), plain)


def _crops(size: Tensor) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, configs.PINPOINTS, SMALL_CROP))


def _lengths(pack: Any, config: Any, crops: list[int], sizes: Tensor, *args: Any, **options: Any) -> list[int]:
    features = [torch.zeros(count, (SMALL_CROP // PATCH) ** 2, 1) for count in crops]
    _, lengths = pack(SimpleNamespace(config=config), features, sizes, *args, image_newline=torch.zeros(1), **options)
    return lengths.tolist()


def watch_llava_onevision(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    frames = 2 * videos[0][0]  # every video of a batch has as many
    pixels = torch.randn(len(videos), frames, 3, SMALL_CROP, SMALL_CROP, generator=draw)
    pooled = -(-SMALL_CROP // PATCH // 2)
    return {"pixel_values_videos": pixels}, [[[VIDEO] * (frames * pooled**2 + 1)]] * len(videos)


def watch_llava_next_video(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    frames = 2 * videos[0][0]  # every video of a batch has as many
    pixels = torch.randn(len(videos), frames, 3, SMALL_CROP, SMALL_CROP, generator=draw)
    return {"pixel_values_videos": pixels}, [[[VIDEO] * frames]] * len(videos)


def see_qwen(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("Qwen2VLImageProcessor")(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    return seen, spans_of(pictures, (seen["image_grid_thw"].prod(1) // 4).tolist(), wrapped)


def watch_qwen(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    grids = torch.tensor([[t, h // PATCH, w // PATCH] for t, h, w in videos])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * PATCH**2, generator=draw)
    frame_by_frame = config.model_type in (
        "qwen3_vl",
        "qwen3_vl_moe",
        "cosmos3_omni",
        "cohere_compass",
        "muse_glimmer",
        "muse_spark",
        "qwen3_5",
        "qwen3_5_moe",
    )  # which writes the time before every frame
    spans = []
    for t, h, w in grids.tolist():
        times, count = (t, h * w // 4) if frame_by_frame else (1, t * h * w // 4)
        stamp = [TEXT.start] if frame_by_frame else []
        spans.append([[*stamp, START, *[VIDEO] * count, END] * times])
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}, spans


def watch_glm(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    """Every frame as an image, with the time behind it."""
    seen, _ = watch_qwen(config, videos, draw)
    grids = seen["video_grid_thw"].tolist()
    return seen, [[[FAKE, *([*wrapped(h * w // 4), TEXT.start] * t), GLOBAL]] for t, h, w in grids]


def watch_omni(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    seen, spans = watch_qwen(config, videos, draw)
    return {**seen, "video_second_per_grid": torch.ones(len(videos))}, spans


def modalities(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    known = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    if "mm_token_type_ids" not in known:  # older releases find the images by their start tokens
        return inputs
    image = 2 if "pixel_values_videos" in inputs else 1  # of GLM, where frames have image tokens
    return {**inputs, "mm_token_type_ids": image * (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def see_internvl(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("GotOcr2ImageProcessor")(
        size={"height": CROP, "width": CROP}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    seen = make(images=_flat(pictures), return_tensors="pt")
    counts = [4 * int(crops) for crops in seen["num_patches"]]
    return {"pixel_values": seen["pixel_values"]}, spans_of(pictures, counts, wrapped)


def see_idefics3(config: Any, pictures: Pictures) -> AttentionCall:
    kind = "SmolVLMImageProcessor" if config.model_type == "smolvlm" else "Idefics3ImageProcessor"
    make = _processor(kind)(size={"longest_edge": 2 * CROP}, max_image_size={"longest_edge": CROP})
    seen = make(images=pictures, return_tensors="pt", return_row_col_info=True)
    spans = [
        [_idefics3_ids(*shape) for shape in zip(rows, columns, strict=True)]
        for rows, columns in zip(seen["rows"], seen["cols"], strict=True)
    ]
    return {name: seen[name] for name in ("pixel_values", "pixel_attention_mask")}, spans


def _idefics3_ids(rows: int, columns: int) -> list[int]:
    cells = [token for cell in range(rows * columns) for token in (FAKE, CELL + cell, *[IMAGE] * 4)]
    return [*cells, FAKE, GLOBAL, *[IMAGE] * 4, FAKE]


def prefix(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def image_blocks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def see_idefics2(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("Idefics2ImageProcessor")(
        size={"shortest_edge": 8, "longest_edge": CROP}, do_image_splitting=False
    )
    seen = dict(make(images=pictures, return_tensors="pt"))
    latents = config.perceiver_config.resampler_n_latents
    return seen, spans_of(pictures, [latents] * len(_flat(pictures)), wrapped)


def see_lighton_ocr(config: Any, pictures: Pictures) -> AttentionCall:
    """Of any size, padded to the largest of the batch."""
    make = _processor("PixtralImageProcessor")(size={"longest_edge": 32}, patch_size=PATCH)
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    counts = [(height // 8) * (width // 8) for height, width in torch.as_tensor(seen["image_sizes"]).tolist()]
    return seen, spans_of(pictures, counts, plain)


def see_deepseek_vl_hybrid(config: Any, pictures: Pictures) -> AttentionCall:
    """Twice, in two sizes."""
    low, spans = fixed("SiglipImageProcessor", CROP, 16)(config, pictures)
    high, _ = fixed("SiglipImageProcessor", config.high_res_vision_config.image_size, 16)(config, pictures)
    return {**low, "high_res_pixel_values": high["pixel_values"]}, spans
