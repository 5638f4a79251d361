"""Finding a transformers decoder in a model, and the parts of it that the engine intercepts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tokenprune.core.reads import PositionKernel, Read, RotaryTables
from tokenprune.core.scheduling.requirements import DECODER_READS, TYPICAL_TOKENS
from tokenprune.core.stage import Shape
from tokenprune.engine.calls.wrappers import modules_of, uncompiled
from tokenprune.errors import EngineError, UnsupportedError
from tokenprune.utils.arguments import shown

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Types of layers that attend to the sequence, each to the positions that its mask shows."""
STATES = frozenset({"linear_attention", "conv"})
"""Types of layers that run over the sequence in order, and keep a state instead of keys: linear attention, short
convolutions. Padding is told to them by a 2-D mask, and must stand before a row's tokens."""
NORMS = ("norm", "embedding_norm")


@dataclass(frozen=True)
class Decoder:
    """A decoder stack.

    Attributes:
        module: the module whose forward runs the layers.
        layers: the decoder layers, in order.
        called: the modules that the decoder calls for them: the same, or wrappers of `torch.compile`.
        rotary: computes (cos, sin) from (states, position ids), in some decoders for each type of layer.
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    called: tuple[nn.Module, ...]
    rotary: nn.Module

    def attention_of(self, layer: int) -> nn.Module | None:
        """The attention module of a layer; None if it has none that can be tapped."""
        for child in self.layers[layer].children() if self.attends[layer] else ():
            attention: nn.Module = uncompiled(child)
            if hasattr(attention, "config") and hasattr(attention, "layer_idx"):
                return attention
        return None

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer. Raises UnsupportedError if it has none that can be tapped."""
        found = self.attention_of(layer)
        if found is not None:
            return found
        raise UnsupportedError(
            f"layer {layer} of {type(self.module).__name__} has no attention module of transformers; its attention "
            "cannot be read"
        )

    @cached_property
    def attends(self) -> tuple[bool, ...]:
        """For each layer, whether it attends to the sequence; the others keep a state."""
        types: Any = getattr(self.module.config, "layer_types", None)
        return tuple(kind not in STATES for kind in types[: len(self.layers)]) if types else (True,) * len(self.layers)

    @cached_property
    def tempered(self) -> frozenset[int]:
        """The layers whose queries are scaled by their place; see `sequence.temperature`."""
        return frozenset(layer for layer in range(len(self.layers)) if scales_by_place(self.attention_of(layer)))

    @property
    def keeps_states(self) -> bool:
        """True if some layers keep a state."""
        return not all(self.attends)

    @property
    def norm(self) -> Any:
        """The module that its output has passed."""
        return next(getattr(self.module, name) for name in NORMS if hasattr(self.module, name))

    def is_observed(self, layer: int) -> bool:
        """True if other code observes the states between a layer and the next one, as `output_hidden_states=True` does.

        It may use hooks of any kind, on either layer or on all modules, or, in older releases of transformers, replace
        `forward`. Checked at each layer, since hooks may be added and removed while the model runs.
        """
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return True
        ends = slice(layer, layer + 2)
        for own in self.layers[ends]:
            if not hasattr(own.forward, "__tokenprune__"):
                return True
        for part in (*self.layers[ends], *self.called[ends]):
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return True
        return False

    def kind(self, layer: int) -> tuple[type, str | None]:
        """What tells a layer's code from that of others: its class, and the kind of its attention."""
        types: Any = getattr(self.module.config, "layer_types", None)
        return type(self.layers[layer]), types[layer] if types else None

    def check_layers(self) -> None:
        """Raise EngineError if the model's layers were replaced; the error names what changed."""
        layers: Any = self.module.layers
        if len(layers) != len(self.layers):
            raise self.changed(f"{len(layers)} layers found, expected {len(self.layers)}")
        for number, (found, called, layer) in enumerate(zip(layers, self.called, self.layers, strict=True)):
            if found is not called and uncompiled(found) is not layer:
                raise self.changed(f"layer {number} was replaced by another module")

    def changed(self, what: str) -> EngineError:
        """The error for a decoder that was changed while a context is open."""
        return EngineError(
            f"{type(self.module).__name__} was changed while tokenprune.prune() is open: {what}; change the model "
            "before the context is opened, or after it is closed"
        )

    @property
    def heads(self) -> int:
        """Number of attention heads of a layer, the fewest where layers differ; 0 if the configuration does not say."""
        config: Any = self.module.config
        try:
            return int(getattr(config, "num_attention_heads", 0) or 0)
        except RuntimeError:  # by which transformers refuses what differs between layers
            return min(int(config.per_layer_config[n].num_attention_heads) for n in range(len(self.layers)))

    @property
    def multimodal_rope(self) -> bool:
        """True if positions have several axes (Qwen2-VL's M-RoPE)."""
        return any("mrope_section" in (rope or {}) for rope in rotary_parameters(self.module.config))

    @property
    def axes(self) -> int:
        """Number of axes of positions: 1, or that of M-RoPE's sections."""
        return max(len((rope or {}).get("mrope_section") or (1,)) for rope in rotary_parameters(self.module.config))

    @property
    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that the engine provides for this decoder."""
        if None in rotary_parameters(self.module.config):  # some layers have no rotary embedding
            return DECODER_READS - {PositionKernel, RotaryTables}
        return DECODER_READS - {PositionKernel} if self.multimodal_rope else DECODER_READS

    def typical_shape(self, vision: frozenset[type[Read]], tower_layers: int) -> Shape:
        """The shape of a run with a typical number of image tokens.

        Args:
            vision: kinds of reads that the vision side answers.
            tower_layers: layers of the vision tower.
        """
        return Shape(len(self.layers), TYPICAL_TOKENS, 0, tower_layers, self.offers | vision, self.heads)

    def tables(self, layer: int, hidden: Tensor, ids: Tensor, rotary: nn.Module | None = None) -> tuple[Tensor, ...]:
        """Rotary tables, cos and sin [batch, n, D] or one complex [batch, n, D / 2], for positions [batch, n] in a
        layer, from `rotary` if given."""
        rotary = rotary or self.rotary
        types: Any = getattr(self.module.config, "layer_types", None)
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        extra = {"layer_type": types[layer]} if typed else {}
        made: Any = rotary(hidden, position_ids=ids, **extra)
        return (made,) if isinstance(made, Tensor) else tuple(made)

    def check_padding(self, layer: int) -> None:
        """Raise UnsupportedError if padding, though zeroed, would change the empty state of a layer."""
        mixers = [part for part in self.layers[layer].children() if hasattr(part, "layer_idx")]
        parts = [part for mixer in mixers for part in mixer.modules() if isinstance(part, (nn.Linear, nn.Conv1d))]
        if any(part.bias is not None for part in parts):
            raise UnsupportedError(
                f"layer {layer} of {type(self.module).__name__} adds biases to padding, which would change its state: "
                "rows of a batch that keep different numbers of tokens are not supported; call the model row by row"
            )

    def check_mask(self, mask: Any) -> None:
        """Raise UnsupportedError for a mask that cannot be shortened; names the attention implementation."""
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedError(
                f"attention implementation {self.attention_name!r} takes masks of type {type(mask).__name__}, which "
                "cannot be shortened to the remaining tokens; load the model with attn_implementation='sdpa', or call "
                "model.set_attn_implementation('sdpa')"
            )

    @property
    def checkpoints(self) -> bool:
        """True if gradient checkpointing is enabled."""
        for part in (self.module, *self.layers):
            if part.training and getattr(part, "gradient_checkpointing", False):
                return True
        return False

    @property
    def attention_name(self) -> str:
        """Name of the model's attention implementation."""
        config: Any = self.module.config
        return str(config._attn_implementation or "eager")

    def check_window(self, length: int) -> None:
        """Raise UnsupportedError if flash attention would count a sliding window in the tokens that are left.

        Args:
            length: tokens of a row so far, pruned ones included.
        """
        config: Any = self.module.config
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # Mistral's all have it, if it is set
        window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
        if window is not None and length > window and "flash" in self.attention_name:
            raise UnsupportedError(
                f"{self.attention_name} counts the sliding window of {window} tokens without those that were pruned, "
                f"of {length} in all; load the model with attn_implementation='sdpa', or call "
                "model.set_attn_implementation('sdpa')"
            )


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a model: the one submodule with `layers`, `rotary_emb` and `norm`.

    Raises:
        UnsupportedError: not a module, no decoder or several inside, or layers that are not self-attention.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{shown(model)} is not a torch.nn.Module; expected a model")
    found = [
        module
        for module in modules_of(model)
        if isinstance(module._modules.get("layers"), nn.ModuleList)  # fast, since this runs over all modules
        and isinstance(getattr(module, "rotary_emb", None), nn.Module)
        and any(hasattr(module, name) for name in NORMS)
    ]
    if len(found) != 1:
        names = ", ".join(type(module).__name__ for module in found) or "none"
        near = "" if found else _near(model)
        raise UnsupportedError(
            f"{type(model).__name__}: expected exactly one decoder (a module with layers, rotary_emb and norm), "
            f"found {names}{near}; pass the decoder itself to tokenprune.prune(), or set it in the adapter's "
            "BoundModel"
        )
    module = found[0]
    unsupported = unsupported_layers(getattr(module, "config", None))
    if unsupported:
        raise UnsupportedError(
            f"{type(module).__name__} has {unsupported}; only decoders whose layers depend on nothing but their input, "
            "and attend to it or keep a state of it, are supported"
        )
    layers: Any = module.layers
    rotary: Any = module.rotary_emb
    return Decoder(module, tuple(map(uncompiled, layers)), tuple(layers), uncompiled(rotary))


def scales_by_place(attention: Any) -> bool:
    """Whether an attention module multiplies its queries by a factor that grows with their place."""
    return bool(getattr(attention, "attn_temperature_tuning", False)) and not getattr(attention, "use_rope", False)


def _near(model: nn.Module) -> str:
    """The modules with layers, and the attributes that they lack to be decoders."""
    lacking = []
    for module in modules_of(model):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            missing = [] if hasattr(module, "rotary_emb") else ["rotary_emb"]
            missing += [] if any(hasattr(module, name) for name in NORMS) else ["norm"]
            lacking.append(f"{type(module).__name__} has no {' and no '.join(missing)}")
    return f" ({'; '.join(lacking)})" if lacking else ""


def rotary_parameters(config: Any) -> list[dict[str, Any] | None]:
    """The parameters of a decoder's rotary embedding, or those of each type of layer; None for a type without one."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {*(getattr(config, "layer_types", None) or ())}
    return [found[kind] for kind in sorted(kinds)] if kinds and kinds <= set(found) else [found]


DEPENDENT = {
    "num_kv_shared_layers": "layers that attend to the keys of earlier layers",
    "hidden_size_per_layer_input": "layers that take a further input for each token (per-layer embeddings)",
}
"""Attributes of configurations, 0 if no layer depends on more than its input."""


def unsupported_layers(config: Any) -> str | None:
    """The layers in a decoder's configuration that are not self-attention over their input, in words."""
    if kinds := other_layers(config):
        return f"layers of type {', '.join(kinds)}"
    return next((what for name, what in DEPENDENT.items() if getattr(config, name, 0)), None)


def other_layers(config: Any) -> list[str]:
    """The types of layers in a decoder's configuration that neither attend to the sequence nor keep a state of it."""
    kinds = {*(getattr(config, "layer_types", None) or ())} - ATTENTION - STATES
    if getattr(config, "cross_attention_layers", None):
        kinds.add("cross_attention")
    return sorted(kinds)
