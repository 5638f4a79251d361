"""One tiny random model, and inputs for it, for each family of transformers' vision-language models.

`FAMILIES["qwen2_5_vl"].build()` is the real class with random weights; `.inputs([(24, 32), (40, 24)])` is what its
processor would give for a batch of two rows with an image each, random text around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vlm_configs as configs
from PIL import Image
from torch import Tensor, nn
from vlm_configs import BOS, CELL, CROP, END, FAKE, GLOBAL, IMAGE, PAD, PATCH, SMALL_CROP, SPECIAL, START, TEXT, VIDEO

from tokenprune_adapters.hf.adapter import OLDEST

Pictures = list[list[Image.Image]]  # by batch row
AttentionCall = tuple[
    dict[str, Tensor], list[list[list[int]]]
]  # model inputs; per row and image, the ids that stand for it


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: key in FAMILIES.
        config: makes the tiny configuration.
        see: pictures by batch row -> the model's image inputs, and the ids that stand for each picture.
        watch: the same for one video a row, given as (frames / 2, height, width); None where there is no video.
        finish: adds what else the model wants, given the inputs so far.
        image_first: whether no text may stand before the image.
        eager_text: whether transformers runs the text stack with eager attention only.
    """

    name: str
    config: Callable[[], Any]
    see: Callable[[Any, Pictures], AttentionCall]
    watch: Callable[[Any, list[tuple[int, int, int]], torch.Generator], AttentionCall] | None = None
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    image_first: bool = False
    eager_text: bool = False

    def build(self, attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """The model in eval mode, with random weights. Its generate() never stops early nor names an image token."""
        self._skip_where_lacking()
        chosen = {"text_config": "eager", "vision_config": attention} if self.eager_text else attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForImageTextToText.from_config(
                self.config(), attn_implementation=chosen, dtype=dtype
            )
            with torch.no_grad():  # position tables, [CLS] and projections that start at zero would hide mistakes
                for parameter in model.parameters():
                    if not parameter.any():
                        parameter.normal_(0, 0.2)
        generation = model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.suppress_tokens = None, PAD, SPECIAL
        return model.train(False)

    def inputs(
        self,
        sizes: Sequence[Any],
        seed: int = 0,
        texts: Sequence[tuple[int, int]] | None = None,
        padding: str = "left",
        first: int = 0,
    ) -> dict[str, Tensor]:
        """Inputs for `model(**inputs)` and, padded on the left, `model.generate(**inputs)`.

        Args:
            sizes: per row, (height, width) of its image, a list of such pairs for several images, or
                (frames / 2, height, width) of a video; videos and images do not mix in one batch.
            seed: of pixels and text.
            texts: per row, number of text tokens before and after; random by default.
            padding: "left" or "right".
            first: number of the first row; row r of a batch alone is `inputs(sizes[r : r + 1], first=r)`.
        """
        self._skip_where_lacking()
        draws = [torch.Generator().manual_seed(1000 * seed + first + row) for row in range(len(sizes))]
        config = self.config()
        if all(isinstance(size, tuple) and len(size) == 3 for size in sizes):
            assert self.watch is not None, f"{self.name} has no videos here"
            seen, spans = self.watch(config, list(sizes), draws[0])
        else:
            rows = [size if isinstance(size, list) else [size] for size in sizes]
            pairs = zip(rows, draws, strict=True)
            seen, spans = self.see(config, [[_picture(*size, draw) for size in row] for row, draw in pairs])
        ids = []
        for row, (images, draw) in enumerate(zip(spans, draws, strict=True)):
            before, after = self._texts(first + row, draw) if texts is None else texts[row]
            start = [] if self.image_first else [BOS, *_text(before, draw)]
            between = 0 if self.image_first else 2
            middle = [token for span in images for token in (*_text(between, draw), *span)]
            ids.append([*start, *middle, *([BOS] if self.image_first else []), *_text(after, draw)])
        return self.finish({**_padded(ids, padding), **seen})

    def _skip_where_lacking(self) -> None:
        """Skips the test that runs, with a reason, where an older release of transformers lacks something."""
        lacking = None if CURRENT else _lacking(self.name)
        if lacking is not None:
            pytest.skip(lacking)

    def _texts(self, row: int, draw: torch.Generator) -> tuple[int, int]:
        total = 9 + 3 * (row % 3)  # neighbouring rows differ in length, so that batches are padded
        before = 0 if self.image_first else int(torch.randint(2, 7, (1,), generator=draw))
        return before, total - before

    def image_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Bool [batch, sequence]: every placeholder of an image or video."""
        return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)

    def decoder(self, model: Any) -> nn.Module:
        """The text stack: layers, norm, rotary_emb."""
        found: nn.Module = getattr(model.model, "language_model", None) or model.model.text_model
        return found


def _picture(height: int, width: int, draw: torch.Generator) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=draw).numpy().astype(np.uint8))


def _text(count: int, draw: torch.Generator) -> list[int]:
    return torch.randint(TEXT.start, TEXT.stop, (count,), generator=draw).tolist()


def _padded(ids: list[list[int]], padding: str) -> dict[str, Tensor]:
    width = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        fill, ones = [PAD] * (width - len(row)), [1] * len(row)
        rows.append(fill + row if padding == "left" else row + fill)
        masks.append([0] * len(fill) + ones if padding == "left" else ones + [0] * len(fill))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def _spans(pictures: Pictures, counts: Sequence[int], wrap: Callable[[int], list[int]]) -> list[list[list[int]]]:
    """Ids for the pictures of each row, where `counts` runs over all pictures of the batch."""
    left = iter(counts)
    return [[wrap(next(left)) for _ in row] for row in pictures]


def _processor(name: str) -> Any:
    """The image processor that needs no torchvision; older releases call it by the plain name."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _plain(count: int) -> list[int]:
    return [IMAGE] * count


def _wrapped(count: int) -> list[int]:
    return [START, *[IMAGE] * count, END]


def _flat(pictures: Pictures) -> list[Image.Image]:
    return [picture for row in pictures for picture in row]


# families ------------------------------------------------------------------------------------------------------------


def _fixed(processor: str, side: int, count: int, wrap: Callable[[int], list[int]] = _plain, **options: Any) -> Any:
    """One square crop, `count` tokens."""

    def see(config: Any, pictures: Pictures) -> AttentionCall:
        make = _processor(processor)(size={"height": side, "width": side}, **options)
        pixels = make(images=_flat(pictures), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels}, _spans(pictures, [count] * len(pixels), wrap)

    return see


def _see_llava_next(config: Any, pictures: Pictures) -> AttentionCall:
    size = {"height": SMALL_CROP, "width": SMALL_CROP}
    make = _processor("LlavaNextImageProcessor")(
        size={"shortest_edge": SMALL_CROP}, crop_size=size, image_grid_pinpoints=configs.PINPOINTS
    )
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    pack = transformers.LlavaNextModel.pack_image_features
    crops = [_crops(size) for size in seen["image_sizes"]]
    return seen, _spans(pictures, _lengths(pack, config, crops, seen["image_sizes"], "default"), _plain)


def _see_llava_onevision(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("LlavaOnevisionImageProcessor")(
        size={"height": SMALL_CROP, "width": SMALL_CROP}, image_grid_pinpoints=configs.PINPOINTS
    )
    seen = dict(make(images=pictures, return_tensors="pt"))
    alone = [count == 1 for count in seen["batch_num_images"].tolist() for _ in range(count)]
    crops = [_crops(size) if one else 1 for size, one in zip(seen["image_sizes"], alone, strict=True)]
    pack = transformers.LlavaOnevisionModel.pack_image_features
    ratio = {"vision_aspect_ratio": config.vision_aspect_ratio}
    return seen, _spans(pictures, _lengths(pack, config, crops, seen["image_sizes"], **ratio), _plain)


def _crops(size: Tensor) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, configs.PINPOINTS, SMALL_CROP))


def _lengths(pack: Any, config: Any, crops: list[int], sizes: Tensor, *args: Any, **options: Any) -> list[int]:
    features = [torch.zeros(count, (SMALL_CROP // PATCH) ** 2, 1) for count in crops]
    _, lengths = pack(SimpleNamespace(config=config), features, sizes, *args, image_newline=torch.zeros(1), **options)
    return lengths.tolist()


def _watch_llava_onevision(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    frames = 2 * videos[0][0]  # every video of a batch has as many
    pixels = torch.randn(len(videos), frames, 3, SMALL_CROP, SMALL_CROP, generator=draw)
    pooled = -(-SMALL_CROP // PATCH // 2)
    return {"pixel_values_videos": pixels}, [[[VIDEO] * (frames * pooled**2 + 1)]] * len(videos)


def _see_qwen(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("Qwen2VLImageProcessor")(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    seen = dict(make(images=_flat(pictures), return_tensors="pt"))
    return seen, _spans(pictures, (seen["image_grid_thw"].prod(1) // 4).tolist(), _wrapped)


def _watch_qwen(config: Any, videos: list[tuple[int, int, int]], draw: torch.Generator) -> AttentionCall:
    grids = torch.tensor([[t, h // PATCH, w // PATCH] for t, h, w in videos])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * PATCH**2, generator=draw)
    frame_by_frame = config.model_type.startswith("qwen3")  # which writes the time before every frame
    spans = []
    for t, h, w in grids.tolist():
        times, count = (t, h * w // 4) if frame_by_frame else (1, t * h * w // 4)
        stamp = [TEXT.start] if frame_by_frame else []
        spans.append([[*stamp, START, *[VIDEO] * count, END] * times])
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}, spans


def _modalities(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    known = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
    if "mm_token_type_ids" not in known:  # older releases find the images by their start tokens
        return inputs
    return {**inputs, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _see_internvl(config: Any, pictures: Pictures) -> AttentionCall:
    make = _processor("GotOcr2ImageProcessor")(
        size={"height": CROP, "width": CROP}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    seen = make(images=_flat(pictures), return_tensors="pt")
    counts = [4 * int(crops) for crops in seen["num_patches"]]
    return {"pixel_values": seen["pixel_values"]}, _spans(pictures, counts, _wrapped)


def _see_idefics3(config: Any, pictures: Pictures) -> AttentionCall:
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


def _prefix(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _image_blocks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


_clip = _fixed("CLIPImageProcessor", CROP, 16, crop_size={"height": CROP, "width": CROP})
_siglip = _fixed("SiglipImageProcessor", CROP, 16)
_qwen: dict[str, Any] = {"see": _see_qwen, "watch": _watch_qwen, "finish": _modalities}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", configs.llava, _clip),
        Family("llava_siglip", configs.llava_siglip, _siglip),
        Family("llava_next", configs.llava_next, _see_llava_next),
        Family("llava_onevision", configs.llava_onevision, _see_llava_onevision, _watch_llava_onevision),
        Family("qwen2_vl", configs.qwen2_vl, **_qwen),
        Family("qwen2_5_vl", configs.qwen2_5_vl, **_qwen),
        Family("qwen3_vl", configs.qwen3_vl, **_qwen),
        Family("qwen3_vl_moe", configs.qwen3_vl_moe, **_qwen),
        Family("internvl", configs.internvl, _see_internvl),
        Family("smolvlm", configs.smolvlm, _see_idefics3),
        Family("idefics3", configs.idefics3, _see_idefics3),
        Family("paligemma", configs.paligemma, _siglip, finish=_prefix, image_first=True),
        Family("paligemma2", configs.paligemma2, _siglip, finish=_prefix, image_first=True, eager_text=True),
        Family(
            "gemma3",
            configs.gemma3,
            _fixed("SiglipImageProcessor", 24, 9, _wrapped),
            finish=_image_blocks,
        ),
    )
}


RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CURRENT = RELEASE >= (5, 20)
RECOMPUTES = pytest.mark.skipif(
    not CURRENT, reason=f"generate(use_cache=False) of transformers {transformers.__version__} is another computation"
)


@functools.cache
def _lacking(name: str) -> str | None:
    """What an older release lacks for a family: its classes, or its image processor without torchvision."""
    if RELEASE < OLDEST:
        return f"transformers {transformers.__version__}: the adapter for its own models needs {OLDEST[0]}.{OLDEST[1]}"
    try:
        family = FAMILIES[name]
        family.see(family.config(), [[_picture(CROP, CROP, torch.Generator())]])
    except (AttributeError, ImportError) as error:
        return f"transformers {transformers.__version__} without torchvision: {str(error).strip().splitlines()[0]}"
    return None


def generates_otherwise(name: str, options: dict[str, Any]) -> str | None:
    """What generate() with these options does by itself on older releases, which no test can hold to a forward."""
    as_list = bool({"num_return_sequences", "num_beams"} & set(options))
    if name == "internvl" and as_list and not CURRENT:
        return f"transformers {transformers.__version__}: for several sequences crops are repeated, not pictures"
    if name in ("smolvlm", "idefics3") and not options.get("use_cache", True) and RELEASE < (5, 5):
        return f"transformers {transformers.__version__}: pixels are dropped behind the first step without a cache"
    return None


NAMES = list(FAMILIES)
"""Parameters of tests. Models and inputs skip the test where an older release of transformers has no such family."""
VIDEO_NAMES = [name for name, family in FAMILIES.items() if family.watch]
