"""One tiny random model, and inputs for it, for each family of transformers' vision-language models.

`FAMILIES["qwen2_5_vl"].build()` is the real class with random weights; `.inputs([(24, 32), (40, 24)])` is what its
processor would give for a batch of two rows with an image each, random text around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
import vlm_configs as configs
import vlm_further_configs as further
import vlm_more_configs as more
import vlm_other_layers as others
import vlm_other_towers as towers
import vlm_video_configs as videos
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vlm_configs import BOS, CROP, IMAGE, PAD, SPECIAL, VIDEO
from vlm_inputs import (
    AttentionCall,
    Pictures,
    fixed,
    image_blocks,
    modalities,
    padded,
    prefix,
    see_deepseek_vl_hybrid,
    see_idefics2,
    see_idefics3,
    see_internvl,
    see_lighton_ocr,
    see_llava_next,
    see_llava_onevision,
    see_qwen,
    text_ids,
    watch_glm,
    watch_llava_next_video,
    watch_llava_onevision,
    watch_omni,
    watch_qwen,
    wrapped,
)
from vlm_inputs import (
    picture as _picture,
)
from vlm_kimi import kimi_k25, see_kimi

from tokenprune_adapters.hf.adapter import OLDEST
from tokenprune_adapters.hf.families import FAMILIES as KNOWN


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
        change: changes the model in what its configuration does not tell.
        eager_tower: whether transformers runs the tower with eager attention only.
        eager_text: whether transformers runs the text stack with eager attention only.
    """

    name: str
    config: Callable[[], Any]
    see: Callable[[Any, Pictures], AttentionCall]
    watch: Callable[[Any, list[tuple[int, int, int]], torch.Generator], AttentionCall] | None = None
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    change: Callable[[Any], Any] = id
    image_first: bool = False
    eager_text: bool = False
    eager_tower: bool = False

    def build(self, attention: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """The model in eval mode, with random weights. Its generate() never stops early nor names an image token."""
        self._skip_where_lacking()
        own = {"text_config": self.eager_text, "vision_config": self.eager_tower}
        parts = {part: "eager" if eager else attention for part, eager in own.items()}
        chosen = parts if any(own.values()) else attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForImageTextToText.from_config(
                self.config(), attn_implementation=chosen, dtype=dtype
            )
            self.change(model)
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
            start = [] if self.image_first else [BOS, *text_ids(before, draw)]
            between = 0 if self.image_first else 2
            middle = [token for span in images for token in (*text_ids(between, draw), *span)]
            ids.append([*start, *middle, *([BOS] if self.image_first else []), *text_ids(after, draw)])
        return self.finish({**padded(ids, padding), **seen})

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
        base = model.base_model
        found = getattr(base, "language_model", None) or getattr(base, "text_model", base)
        inner: nn.Module = getattr(found, "model", found)  # Llama 4's has a head of its own
        return inner


clip = fixed("CLIPImageProcessor", CROP, 16, crop_size={"height": CROP, "width": CROP})
siglip = fixed("SiglipImageProcessor", CROP, 16)
sixteen = fixed("SiglipImageProcessor", CROP, 16, wrapped)
queries = fixed("SiglipImageProcessor", CROP, 9, wrapped)
nines = fixed("SiglipImageProcessor", 24, 9, wrapped)
qwen: dict[str, Any] = {"see": see_qwen, "watch": watch_qwen, "finish": modalities}
glm = {**qwen, "watch": watch_glm}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", configs.llava, clip),
        Family("llava_siglip", configs.llava_siglip, siglip),
        Family("vipllava", more.vipllava, clip),
        Family("deepseek_vl", more.deepseek_vl, siglip),
        Family("janus", more.janus, siglip),
        Family("aya_vision", more.aya_vision, nines),
        Family("cohere2_vision", more.cohere2_vision, nines),
        Family("llava_next", configs.llava_next, see_llava_next),
        Family("llava_next_video", more.llava_next_video, see_llava_next, watch_llava_next_video),
        Family("llava_onevision", configs.llava_onevision, see_llava_onevision, watch_llava_onevision),
        Family("qwen2_vl", configs.qwen2_vl, **qwen),
        Family("qwen2_5_vl", configs.qwen2_5_vl, **qwen),
        Family("qwen3_vl", configs.qwen3_vl, **qwen),
        Family("qwen3_vl_moe", configs.qwen3_vl_moe, **qwen),
        Family("glm4v", more.glm4v, **glm),
        Family("glm46v", more.glm46v, **glm),
        Family("glm4v_moe", more.glm4v_moe, **glm),
        Family("glm_ocr", more.glm_ocr, **glm),
        Family("internvl", configs.internvl, see_internvl),
        Family("qianfan_ocr", more.qianfan_ocr, see_internvl),
        Family("smolvlm", configs.smolvlm, see_idefics3),
        Family("idefics3", configs.idefics3, see_idefics3),
        Family("cosmos3_omni", more.cosmos3_omni, **qwen),
        Family("qwen2_5_omni_thinker", more.qwen2_5_omni_thinker, see_qwen, watch_omni),
        Family("qwen3_omni_moe_thinker", more.qwen3_omni_moe_thinker, see_qwen, watch_omni),
        Family("glmga", more.glmga, **glm),
        Family("got_ocr2", more.got_ocr2, sixteen, eager_tower=True),
        Family("pp_chart2table", more.pp_chart2table, sixteen, eager_tower=True),
        Family("deepseek_vl_hybrid", more.deepseek_vl_hybrid, see_deepseek_vl_hybrid),
        Family("idefics2", more.idefics2, see_idefics2),
        Family("aria", more.aria, queries),
        Family("ovis2", more.ovis2, nines),
        Family("lighton_ocr", more.lighton_ocr, see_lighton_ocr),
        Family("paligemma", configs.paligemma, siglip, finish=prefix, image_first=True),
        Family("paligemma2", configs.paligemma2, siglip, finish=prefix, image_first=True, eager_text=True),
        Family("gemma3", configs.gemma3, nines, finish=image_blocks),
        Family("shieldgemma2", more.shieldgemma2, nines, finish=image_blocks),
        Family("llama4", others.llama4, others.see_llama4),
        Family("qwen3_5", others.qwen3_5, **qwen),
        Family("qwen3_5_moe", others.qwen3_5_moe, **qwen),
        Family("lfm2_vl", others.lfm2_vl, others.see_lfm2_vl),
        Family("lfm3_vl", others.lfm3_vl, see_qwen),
        Family("minicpmv4_6", others.minicpmv4_6, others.see_minicpm),
        Family("minicpmv4_7", others.minicpmv4_7, others.see_minicpm, finish=modalities),
        Family("minicpm_ocr", others.minicpm_ocr, others.see_minicpm),
        Family("video_llava", videos.video_llava, clip, videos.watch_video_llava),
        Family("paddleocr_vl", videos.paddleocr_vl, videos.see_paddleocr_vl, finish=modalities),
        Family("video_llama_3", videos.video_llama_3, videos.see_video_llama_3, videos.watch_video_llama_3),
        Family("hyperclovax_vision_v2", videos.hyperclovax_vision_v2, see_qwen, watch_qwen),
        Family(
            "ernie4_5_vl_moe",
            videos.ernie4_5_vl_moe,
            videos.see_ernie4_5_vl_moe,
            videos.watch_ernie4_5_vl_moe,
            finish=videos.kinds_for_experts,
        ),
        Family("granite_docling", videos.granite_docling, videos.see_granite_docling),
        Family("hunyuan_vl", videos.hunyuan_vl, videos.see_hunyuan_vl, finish=modalities),
        Family("mistral3", further.mistral3, further.see_mistral3),
        Family("cohere_compass", further.cohere_compass, **qwen),
        Family("granite4_vision", further.granite4_vision, further.see_granite4_vision),
        Family(
            "cosmos3_edge",
            further.cosmos3_edge,
            further.see_cosmos3_edge,
            further.watch_cosmos3_edge,
            finish=modalities,
        ),
        Family("step3p7", further.step3p7, further.see_step3p7),
        Family("molmo2", further.molmo2, further.see_molmo2, finish=further.one_block),
        Family("llava_pixtral", further.llava_pixtral, further.see_mistral3),
        *(Family(**row) for row in towers.ROWS),
        Family("kimi_k25", kimi_k25, see_kimi),
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
    if VARIANTS.get(name, name) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return f"transformers {transformers.__version__}: {name} is not among its image-text-to-text models"
    family = FAMILIES[name]
    made = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VARIANTS.get(name, name)]
    if "pixel_values" not in inspect.signature(getattr(transformers, made).forward).parameters:
        return f"transformers {transformers.__version__}: {made} has another name for pixel_values"
    try:
        family.see(family.config(), [[_picture(CROP, CROP, torch.Generator())]])
    except (AttributeError, ImportError) as error:
        return f"transformers {transformers.__version__} without torchvision: {str(error).strip().splitlines()[0]}"
    return None


def generates_otherwise(name: str, options: dict[str, Any]) -> str | None:
    """What generate() with these options does by itself, often on older releases; no test can hold it to a forward."""
    as_list = bool({"num_return_sequences", "num_beams"} & set(options))
    if name == "ernie4_5_vl_moe" and not options.get("use_cache", True):
        return "transformers fails untouched: the kinds of tokens by which experts are chosen do not grow"
    if name == "internvl" and as_list and not CURRENT:
        return f"transformers {transformers.__version__}: for several sequences crops are repeated, not pictures"
    if name in ("smolvlm", "idefics3") and not options.get("use_cache", True) and RELEASE < (5, 5):
        return f"transformers {transformers.__version__}: pixels are dropped behind the first step without a cache"
    return None


NAMES = list(FAMILIES)
"""Parameters of tests. Models and inputs skip the test where an older release of transformers has no such family."""
VIDEO_NAMES = [name for name, family in FAMILIES.items() if family.watch]
VARIANTS = {"llava_siglip": "llava", "llava_pixtral": "llava", "paligemma2": "paligemma"}  # of one `model_type`
READABLE = [name for name in NAMES if KNOWN[VARIANTS.get(name, name)].images.reads_tower]
"""Families whose towers are read."""
