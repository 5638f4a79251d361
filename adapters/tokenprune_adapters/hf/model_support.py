"""Which image-text-to-text models of the installed transformers are supported, and why the others are not."""

from __future__ import annotations

from typing import Any

from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tokenprune.engine.decoder import other_layers, unsupported_layers
from tokenprune.loading.model_support import ModelSupport
from tokenprune_adapters.hf.families import FAMILIES

UNTESTED = "not tested yet; image_tokens=, which marks its image tokens by hand, may prune it"
ENCODER_DECODER = "an encoder-decoder, whose encoder takes the image; only decoders are pruned"
CROSS_ATTENTION = "its text layers read the image by cross-attention, so that no image tokens are in the sequence"
NO_ROTARY = "its decoder has no rotary embedding (positions are added to the embeddings), which pruning requires"
OTHER_NAMES = "its decoder's parts have other names than layers, rotary_emb and norm, by which it is found"
DIFFUSION = "it decodes blocks by diffusion with a second decoder, not token by token"
PROTEINS = "it takes proteins, not images"
TWO_DECODERS = "a robot policy, whose action expert is a second decoder"
INDEXED = "its checkpoints have layers of type minimax_m3_sparse, which choose blocks of keys by places in the sequence"

REASONS: dict[str, str] = {
    "blip": CROSS_ATTENTION,
    "blip-2": NO_ROTARY,
    "diffusion_gemma": DIFFUSION,
    "evolla": PROTEINS,
    "fuyu": OTHER_NAMES,
    "git": NO_ROTARY,
    "idefics": CROSS_ATTENTION,
    "instructblip": NO_ROTARY,
    "instructblipvideo": NO_ROTARY,
    "kosmos-2": NO_ROTARY,
    "kosmos-2.5": NO_ROTARY,
    "minimax_m3_vl": INDEXED,
    "mistral4": "its class in transformers is a language model without images; image_tokens= marks tokens by hand",
    "vision-encoder-decoder": ENCODER_DECODER,
    "pi0": TWO_DECODERS,
}
"""Types whose reason their default configuration does not tell."""


def model_support(model_type: str | None = None) -> list[ModelSupport]:
    """The types in transformers' mapping of image-text-to-text models.

    Args:
        model_type: the only type that is asked for; None = all.
    """
    return [_support(kind) for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if model_type in (None, kind)]


def _support(kind: str) -> ModelSupport:
    family = FAMILIES.get(kind)
    if family is None:
        return ModelSupport(kind, "refused", REASONS.get(kind) or told_by_config(kind) or UNTESTED)
    return ModelSupport(kind, "limited" if family.limits else "supported", "; ".join(family.limits))


def told_by_config(kind: str) -> str | None:
    """The reason that a type's default configuration tells: an encoder-decoder, or layers of other types."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # some default configurations warn of themselves
    try:
        config: Any = CONFIG_MAPPING[kind]()
        text = config.get_text_config(decoder=True)
    except Exception:  # a configuration without defaults, or one that needs a package that is not installed
        return None
    finally:
        logging.set_verbosity(level)
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        return ENCODER_DECODER
    if other_layers(text) == ["cross_attention"]:
        return CROSS_ATTENTION
    what = unsupported_layers(text)
    return None if what is None else f"its decoder has {what}, which cannot run on fewer tokens"
