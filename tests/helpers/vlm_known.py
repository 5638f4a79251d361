"""What tests know of transformers' vision-language models by geometry and by name, independently of the adapter."""

from __future__ import annotations

import functools

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vlm_configs import PATCH
from vlm_families import FAMILIES, READABLE, VARIANTS
from vlm_kimi import row_major_places

from tokenprune_adapters.hf.families import FAMILIES as KNOWN

SEPARATED = ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision", "emu3", "deepseek_ocr2")
WITH_CLS = ("llava", "vipllava", "llava_next", "llava_next_video", "internvl", "qianfan_ocr", "video_llava")
QWENS = ("qwen", "glm", "cosmos", "cohere_compass", "paddleocr", "ernie4", "hunyuan")
MROPE = (*QWENS, "minicpmv4_7")  # whose positions need the ids
PACKED = (*QWENS, "video_llama_3", "hyperclovax", "muse", "exaone")  # of any size; in one sequence
REORDERED = (
    *("qwen2_5_vl", "qwen2_5_omni_thinker", "hyperclovax_vision_v2", "paddleocr_vl", "video_llama_3"),
    *("muse_glimmer", "muse_spark", "exaone4_5", "hunyuan_vl"),
)
NINES = ("gemma3", "shieldgemma2", "aya_vision", "cohere2_vision", "ovis2")  # 9 tokens a crop, of 6 x 6 patches
SECOND_LAST = ("llava", "vipllava", "llava_next_video", "video_llava")  # layer of the tower
TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
ROWS = {"mistral3": 2, "lighton_ocr": 2, "llava_pixtral": 1, "molmo2": 1}  # patches of a token each way; of any size
QUARTERS = ("internvl", "qianfan_ocr", "smolvlm", "idefics3", "granite_docling")  # 4 tokens a crop


CASES = {
    "two sizes": [(24, 32), (40, 20)],
    "several images": [[(24, 32), (32, 24)], (40, 20)],
    "videos": [(2, 16, 24), (2, 24, 16)],
}
PROJECTING = [name for name in READABLE if KNOWN[VARIANTS.get(name, name)].images.projects]
WITH_VIDEO = [name for name in READABLE if FAMILIES[name].watch]
RUNS = [(name, case) for name in READABLE for case in CASES if case != "videos" or name in WITH_VIDEO]
PADDED_RUNS = [(*run, "left") for run in RUNS] + [(name, "two sizes", "right") for name in READABLE]


@functools.cache
def model_of(name, attention="sdpa"):
    return FAMILIES[name].build(attention)


def has_videos(inputs):
    return "pixel_values_videos" in inputs


def is_packed(name, inputs):
    """Whether the image tokens are put together behind the projector, with newlines."""
    return name in SEPARATED and not (name == "llava_next_video" and has_videos(inputs))


def patch_places(name, inputs):
    """[P, 2]: (row, column) of each patch in its picture, for towers that work crop by crop; tiles lie side by side."""
    if name == "kimi_k25":  # pictures of any size, whose patches are in row-major order
        return row_major_places(inputs)
    crop = model_of(name).config.vision_config.image_size if name in SEPARATED else 0
    side = 6 if name in NINES else crop // PATCH or 4
    inside = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    if name == "molmo2":  # the whole picture, then its tiles
        tiles = [
            torch.cartesian_prod(torch.arange(r // 2), torch.arange(c // 2)) for _, _, r, c in inputs["image_grids"]
        ]
        return torch.cat([part for one in tiles for part in (inside, *(inside + 4 * place for place in one))])
    if name in ROWS:
        return torch.cat([torch.cartesian_prod(*map(torch.arange, size)) for size in _sizes(inputs)])
    if name not in SEPARATED or has_videos(inputs):
        lead = {"smolvlm": 2, "idefics3": 2, "granite_docling": 2}.get(name, 2 if has_videos(inputs) else 1)
        used = pixels.flatten(0, lead - 1).flatten(1).any(1)
        return inside.repeat(int(used.sum()), 1)
    places = []
    alone = inputs.get("batch_num_images", torch.ones(len(pixels), dtype=torch.int64))
    tiled = [count == 1 for count in alone.tolist() for _ in range(count)]
    for size, single in zip(inputs["image_sizes"].tolist(), tiled, strict=True):
        places.append(inside)
        pinpoints = model_of(name).config.image_grid_pinpoints
        rows, columns = get_anyres_image_grid_shape(size, pinpoints, crop) if single else (0, 0)
        places += [inside + side * torch.tensor((r, c)) for r in range(rows) for c in range(columns)]
    return torch.cat(places)


def _sizes(inputs):
    """Rows and columns of the patches (Molmo 2: of the tokens) of each image, in families of `ROWS`."""
    if "image_grids" in inputs:
        return inputs["image_grids"].view(-1, 2).tolist()
    return [(height // PATCH, width // PATCH) for height, width in torch.as_tensor(inputs["image_sizes"]).tolist()]


def expected_cells(name, inputs, separator):
    """Per row, (image number, row, column) of every image token in order, from geometry alone.

    Args:
        separator: what `separators` gave.
    """
    placeholders = FAMILIES[name].image_tokens(inputs)
    grids = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
    m = 1 if name == "video_llama_3" and not has_videos(inputs) else 2
    pairs = name == "ernie4_5_vl_moe" and has_videos(inputs)
    grids = [] if grids is None else [(t // 2 if pairs else t, h // m, w // m) for t, h, w in grids.tolist()]
    frames = iter([size for t, *size in grids for _ in range(t)])
    if name in ROWS:
        frames = iter([(rows // ROWS[name], columns // ROWS[name]) for rows, columns in _sizes(inputs)])
    batch = []
    for row, marks in enumerate(placeholders):
        cells, number = [], 0
        # text between its lines does not end an image
        for start, end in [(0, int(marks.sum()))] if name in ROWS else _runs(marks):
            if name in SEPARATED and has_videos(inputs):
                side = 1 if name == "llava_next_video" else 2
                shapes = [(side, side)] * ((end - start) // side**2)  # behind LLaVA-OneVision's a separator is left
            elif name in SEPARATED:
                ends = [p - start for p in range(start, end) if separator[row, p]]
                side = 2 if name == "granite4_vision" else 3
                whole, rest = side**2, end - start - side**2
                lines = [b - a - 1 for a, b in zip([whole - 1, *ends], ends, strict=False)]
                assert whole + len(ends) + sum(lines) == end - start
                assert len(set(lines)) == 1
                shapes = [(side, side)] + ([(len(lines), lines[0])] if rest > 1 else [])
            elif grids or name in ROWS:
                shapes, left = [], end - start
                while left:
                    shapes.append(next(frames))
                    rows, columns = shapes[-1]
                    left -= rows * (columns + 1) + 2 if name == "hunyuan_vl" else rows * columns
            else:
                count = 4 if name in QUARTERS else 9 if name in NINES else 16
                shapes = [(round(count**0.5), round(count**0.5))] * ((end - start) // count)
            for rows, columns in shapes:
                cells += [(number, r, c) for r in range(rows) for c in range(columns)]
                number += 1
        batch.append(cells)
    return batch


def _runs(marks):
    padded = torch.cat((torch.zeros(1), marks.float(), torch.zeros(1))).diff()
    starts, ends = (padded == 1).nonzero().flatten().tolist(), (padded == -1).nonzero().flatten().tolist()
    return zip(starts, ends, strict=True)
