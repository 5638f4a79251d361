"""LISA-shaped models of full size with random weights, that give one fixed answer: for benchmarks without checkpoints.

The next token of the answer is a function of the last one alone: text embeddings are large, layers are weak, and the
head maps each token to its successor. So a model says the same ten tokens whatever was pruned, in any dtype.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
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
from transformers.initialization import no_init_weights

import tokenprune
from tokenprune_adapters.clip.tower import ClipPixels
from tokenprune_adapters.lisa.model import LisaModel
from tokenprune_adapters.segmentation.segmenter import Segmenter

M = TypeVar("M", bound=Segmenter)
ANSWER_TOKENS = 10  # mask tokens and the end of sequence included


@dataclass(frozen=True)
class LisaShape:
    """Sizes of a model.

    Attributes:
        name: for reports.
        layers, hidden, intermediate, heads: of the decoder.
        clip_pixels: side of CLIP-L/14's input: 224 for 256 image tokens, 336 for 576.
        sam: hidden size, layers, heads, global-attention layers and image side of SAM's encoder; None = PixelLM, which
            has none.
    """

    name: str
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    clip_pixels: int = 224
    sam: tuple[int, int, int, Sequence[int], int] | None = field(default=(1280, 32, 16, (7, 15, 23, 31), 1024))


SHAPES = {
    shape.name: shape
    for shape in (
        LisaShape("lisa-7b"),
        LisaShape("glamm-7b", clip_pixels=336),
        LisaShape("pixellm-7b", clip_pixels=336, sam=None),
        LisaShape("lisa-13b", 40, 5120, 13824, 40),
        LisaShape("small", 4, 512, 1376, 8, sam=(256, 4, 4, (1, 3), 256)),
    )
}


def random_lisa(shape: LisaShape, dtype: torch.dtype, device: str = "cpu") -> LisaModel:
    """A model of that shape; the tokenizer is lisa-tiny's."""
    tokenizer = tokenprune.load("lisa-tiny").tokenizer
    assert shape.sam is not None
    width, layers, heads, wide, side = shape.sam
    with uninitialised(dtype):
        decoder = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32004,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                eos_token_id=tokenizer.eos_id,
                attn_implementation="sdpa",
            )
        )
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=shape.clip_pixels,
                patch_size=14,
            )
        )
        vision = SamVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            global_attn_indexes=list(wide),
            image_size=side,
            mlp_dim=4 * width,
        )
        prompts = SamPromptEncoderConfig(image_size=side, image_embedding_size=side // 16)
        sam = SamModel(
            SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=SamMaskDecoderConfig())
        )
        projector = nn.Linear(1024, shape.hidden)
        mask_projection = nn.Sequential(nn.Linear(shape.hidden, shape.hidden), nn.ReLU(), nn.Linear(shape.hidden, 256))
    model = LisaModel(
        decoder=decoder,
        tower=tower,
        projector=projector,
        mask_projection=mask_projection,
        sam=sam,
        clip_pixels=ClipPixels(Path("/nonexistent"), tower),
        select_layer=-2,
        tokenizer=tokenizer,
        mark_image=True,
        name=f"{shape.name} (random weights)",
    )
    return taught(model).to(device)


def llama(shape: LisaShape, end: int) -> LlamaForCausalLM:
    """The decoder; answers end with the id `end`."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32010,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            eos_token_id=end,
            attn_implementation="sdpa",
        )
    )


def clip(shape: LisaShape) -> CLIPVisionModel:
    """CLIP-L/14."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=shape.clip_pixels,
            patch_size=14,
        )
    )


@contextmanager
def uninitialised(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def taught(model: M) -> M:
    """The model with random weights, and an answer."""
    with torch.no_grad():
        _fill(model)
        _teach(model)
    return model.eval()


def _fill(model: nn.Module) -> None:
    """Small random weights, repeated from one buffer: drawing billions of numbers would take minutes."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2**22 + 1, generator=draw)
    for name, weight in model.named_parameters():
        if "norm" in name.lower() and weight.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat, scale = weight.view(-1), 1.0 if "embed_tokens" in name else 0.004
        source = (noise * scale).to(weight.dtype)
        for start in range(0, flat.numel(), len(source)):
            part = flat[start : start + len(source)]
            part.copy_(source[: len(part)])


def _teach(model: Segmenter) -> None:
    """Let the head map the prompt's last token to an answer, token by token."""
    tokenizer, decoder = model.tokenizer, model.decoder
    last = tokenizer.encode("ASSISTANT:", bos=False)[-1]
    words = [i for i in range(300, 300 + ANSWER_TOKENS) if i not in (last, *model.seg_ids)][
        : ANSWER_TOKENS - 1 - len(model.seg_ids)
    ]
    chain = [last, *words, *model.seg_ids, tokenizer.eos_id]
    embeddings: Any = decoder.get_input_embeddings().weight
    decoder.lm_head.weight.mul_(0.1)
    for current, following in itertools.pairwise(chain):
        decoder.lm_head.weight[following] = embeddings[current]


if __name__ == "__main__":
    begun = time.perf_counter()
    made = random_lisa(SHAPES["small"], torch.float32)
    said = made.segment(torch.zeros(3, 64, 80), "the circle", answer="generate")
    print(f"{made}\n{said}\nin {time.perf_counter() - begun:.1f} s")
