"""Recognising and loading Sa2VA checkpoints in their released format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from tokenprune.errors import CheckpointError, OptionError, UnsupportedError
from tokenprune.utils.arguments import whole_number
from tokenprune_adapters.common.checkpoint import Part
from tokenprune_adapters.common.load_options import LoadOptions, shown_name
from tokenprune_adapters.sa2va import decoder as qwen2
from tokenprune_adapters.sa2va import sam2
from tokenprune_adapters.sa2va.chat import FORMATS, IMAGE_END, IMAGE_START, ChatFormat
from tokenprune_adapters.sa2va.model import Sa2vaModel
from tokenprune_adapters.sa2va.stored import Rearranged
from tokenprune_adapters.sa2va.tiles import MAX_TILES
from tokenprune_adapters.sa2va.tokenizer import load_tokenizer
from tokenprune_adapters.sa2va.tower import MERGED, build_tower
from tokenprune_adapters.segmentation.loading import Opened, SegmenterAdapter, mlp, under

OLDEST = 5  # of transformers
PROJECTOR = "mlp1."
MOST_TILES = 256  # ours: 65,536 image tokens, more than any decoder's context
MASK_PROJECTION = "text_hidden_fcs."


@dataclass(frozen=True)
class Sa2vaOptions(LoadOptions):
    """`LoadOptions` and the number of tiles; without a tower, which the checkpoints contain.

    Args:
        max_tiles: largest number of tiles that a picture is cut into, besides the whole picture; each has 256 image
            tokens in the releases. At most `MOST_TILES`.

    Raises:
        OptionError: a number below 1 or above `MOST_TILES`, or a tower.
    """

    max_tiles: int = MAX_TILES

    def __post_init__(self) -> None:
        super().__post_init__()
        if whole_number("max_tiles", self.max_tiles, 1) > MOST_TILES:
            raise OptionError(f"max_tiles: {self.max_tiles} found, expected at most {MOST_TILES}")
        if self.vision_tower is not None:
            raise OptionError("vision_tower= was given, but Sa2VA checkpoints contain their tower; leave it out")


class Sa2vaAdapter(SegmenterAdapter):
    """Sa2VA checkpoints in their released format, with InternVL's tower, a Qwen2 decoder and SAM 2; no code of the
    checkpoint is run. For the options see `Sa2vaOptions`.

    SAM 2's memory, which tracks objects through videos, is left out.
    """

    merges_lora = False
    family = "Sa2VA"
    prefix = sam2.PREFIX
    embedding = qwen2.EMBEDDING
    options = Sa2vaOptions

    @classmethod
    def build(cls, opened: Opened[Sa2vaOptions]) -> Sa2vaModel:
        """The model of an opened checkpoint.

        Raises:
            CheckpointError: as in `load`, or it is a Sa2VA on other parts.
            UnsupportedError: transformers is older than `OLDEST`.
        """
        if int(transformers.__version__.split(".")[0]) < OLDEST:
            raise UnsupportedError(
                f"transformers {transformers.__version__} found, but Sa2VA needs {OLDEST}.0 or newer: before, parts of "
                "InternVL and SAM 2 differ; upgrade it"
            )
        language = _language(opened)
        chat = _chat(opened)
        opened = replace(opened, checkpoint=Rearranged(opened.checkpoint))
        attention = opened.options.attn_implementation
        decoder_part = qwen2.build_qwen2(opened.checkpoint, language, attention)
        tower_part = build_tower(opened.checkpoint, opened.config, attention)
        sam_part = sam2.build_sam2(opened.checkpoint, opened.config, attention)
        reads = tower_part.module.config.hidden_size * MERGED**2
        channels = sam_part.module.prompt_encoder.hidden_size
        select_layer = _select_layer(opened, tower_part.module.config.num_hidden_layers)
        tokenizer = load_tokenizer(
            opened.folder,
            [*Sa2vaModel.seg_tokens, IMAGE_START, IMAGE_END],
            opened.checkpoint.shape(qwen2.EMBEDDING, dims=2)[0],
        )

        def parts(width: int) -> list[Part[Any]]:
            return [
                tower_part,
                _projector(reads, width),
                mlp(MASK_PROJECTION, width, width, channels, nn.ReLU()),
                sam_part,
            ]

        decoder, tower, projector, mask_projection, sam = opened.fill(parts, sam2.of_videos, decoder_part)
        return Sa2vaModel(
            decoder=decoder,
            tower=tower,
            projector=projector,
            mask_projection=mask_projection,
            sam=sam,
            chat=chat,
            max_tiles=opened.options.max_tiles,
            select_layer=select_layer,
            tokenizer=tokenizer,
            mark_image=False,
            name=shown_name(opened.source),
        )


def _projector(reads: int, width: int) -> Part[nn.Sequential]:
    with torch.device("meta"):
        module = nn.Sequential(nn.LayerNorm(reads), nn.Linear(reads, width), nn.GELU(), nn.Linear(width, width))
    return under(PROJECTOR, module)


def _language(opened: Opened[Any]) -> dict[str, Any]:
    """The configuration of the decoder. Raises CheckpointError for a Sa2VA on other parts than these."""
    config = opened.config
    language = config.get("llm_config")
    kinds = language.get("architectures") if isinstance(language, dict) else None
    if not isinstance(language, dict) or kinds != [qwen2.ARCHITECTURE]:
        found = "no llm_config" if language is None else f"a decoder {kinds}"
        raise CheckpointError(
            f"{opened.folder}/config.json has architectures {config.get('architectures')} with {found}, expected "
            f"['{qwen2.ARCHITECTURE}']: of Sa2VA, checkpoints of InternVL's tower with a Qwen2 decoder are supported "
            "(Sa2VA-1B, Sa2VA-4B), not those with InternLM2 (8B, 26B) or Phi-3, or on Qwen-VL"
        )
    for name, wanted in (("ps_version", "v2"), ("downsample_ratio", 1 / MERGED)):
        if config.get(name) != wanted:
            raise CheckpointError(
                f"{opened.folder}/config.json says {name} {config.get(name)!r}, expected {wanted!r}, as in all releases"
            )
    return language


def _chat(opened: Opened[Any]) -> ChatFormat:
    name = str(opened.config.get("template")).replace("-", "_")
    if name not in FORMATS:
        raise CheckpointError(
            f"{opened.folder}/config.json says template {name!r}, expected one of {', '.join(FORMATS)}; use the "
            "config.json that belongs to the checkpoint"
        )
    return FORMATS[name]


def _select_layer(opened: Opened[Any], layers: int) -> int:
    found = opened.config.get("select_layer", -1)
    if isinstance(found, bool) or not isinstance(found, int) or not -layers - 1 <= found <= layers:
        raise CheckpointError(
            f"{opened.folder}/config.json says select_layer {found!r}, but the tower has hidden states 0 … {layers}"
        )
    return found
