"""The sizes of a decoder that determine its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenprune.errors import OptionError, UnknownNameError, UnsupportedError

_CONFIG_NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}
_STATES = {"linear_attention", "conv"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NAMED: dict[str, dict[str, int]] = {
    "7b": {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocab": 32000},
    "13b": {"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40, "vocab": 32000},
}


class DecoderSpec(BaseModel):
    """Sizes of a dense decoder of Llama's kind.

    Attributes:
        layers: decoder layers, L.
        hidden: width of a token's state, d.
        intermediate: inner width of the MLP, m.
        heads: query heads.
        kv_heads: key and value heads; as many as query heads unless given.
        head_dim: width of one head; hidden / heads unless given.
        vocab: rows of `lm_head`, 0 if there is none.
        gated_mlp: three matrices in the MLP (gate, up, down) or two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab: int = Field(0, ge=0)
    gated_mlp: bool = True

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        sizes = {name: value for name, value in given.items() if value is not None}
        hidden, heads = sizes.get("hidden"), sizes.get("heads")
        if isinstance(heads, int) and heads > 0:
            sizes.setdefault("kv_heads", heads)
            if isinstance(hidden, int) and "head_dim" not in sizes:
                if hidden % heads:
                    raise ValueError(f"hidden {hidden} does not divide into {heads} heads; give head_dim")
                sizes["head_dim"] = hidden // heads
        return sizes

    @model_validator(mode="after")
    def _check(self) -> DecoderSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly")
        return self

    @classmethod
    def of(cls, **sizes: Any) -> DecoderSpec:
        """A spec from sizes by name; None counts as not given.

        Raises:
            OptionError: a size that is missing, unknown, or does not fit the others.
        """
        try:
            return cls.model_validate(sizes)
        except ValidationError as error:
            absent = [str(e["loc"][0]) for e in error.errors() if e["type"] == "missing"]
            missing = ", ".join(name for name in absent if name not in ("kv_heads", "head_dim"))
            if missing:
                raise OptionError(
                    f"decoder sizes: {missing} missing; give them all, or name the shape whose sizes "
                    "they change (DecoderSpec.named, --model-shape 7b)"
                ) from error
            others = [str(e["msg"]).removeprefix("Value error, ") for e in error.errors() if e["type"] == "value_error"]
            if others:
                raise OptionError(f"decoder sizes: {'; '.join(others)}") from error
            raise OptionError.from_validation("decoder sizes", error, cls.model_fields) from error

    @classmethod
    def named(cls, name: str, **changes: Any) -> DecoderSpec:
        """Llama's published sizes, "7b" or "13b" (as in LLaVA-1.5 and LISA), with changes.

        Raises:
            UnknownNameError: another name.
            OptionError: changes that do not match.
        """
        if name.lower() not in NAMED:
            raise UnknownNameError.among("model shape", name, NAMED)
        return cls.of(**{**NAMED[name.lower()], **{k: v for k, v in changes.items() if v is not None}})

    @classmethod
    def from_config(cls, config: Any, *, gated_mlp: bool = True, **changes: Any) -> DecoderSpec:
        """Sizes from a Hugging Face config.

        Args:
            config: an object or a mapping with `hidden_size` and so on; where it holds a `text_config`, that counts.
            gated_mlp: whether the MLP has a gate; configs do not say.
            changes: sizes that override the config's.

        Raises:
            OptionError: a size is missing or does not fit.
            UnsupportedError: a mixture of experts, whose cost depends on routing, or layers of another kind or size.
        """
        text = _get(config, "text_config")
        source = config if text is None else text
        for name in _EXPERTS:
            if (_get(source, name) or 0) > 1:
                raise UnsupportedError(
                    f"config: {name}={_get(source, name)} found; the cost model counts dense decoders only"
                )
        others = {*(_get(source, "layer_types") or ())} & _STATES
        if others:
            raise UnsupportedError(
                f"config: layers of type {', '.join(sorted(others))} found; the cost model counts attention in every "
                "layer"
            )
        sizes = {ours: _get(source, theirs) for ours, theirs in _CONFIG_NAMES.items()}
        sizes.update({name: value for name, value in changes.items() if value is not None})
        return cls.of(**sizes, gated_mlp=gated_mlp)


def _get(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # by which transformers refuses what differs between layers
        raise UnsupportedError(
            f"config: {name} differs between layers; the cost model counts decoders of equal layers only"
        ) from error
