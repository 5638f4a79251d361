"""Finding the parts of a transformers decoder that the engine hooks into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedError


@dataclass(frozen=True)
class Decoder:
    """A decoder stack.

    Attributes:
        module: the module whose forward runs the layers.
        layers: the decoder layers, in order.
        rotary: makes (cos, sin) from (states, position ids).
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    rotary: nn.Module

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer. Raises UnsupportedError if the layer has none that can be read."""
        for child in self.layers[layer].children():
            if hasattr(child, "config") and hasattr(child, "layer_idx"):
                return child
        raise UnsupportedError(
            f"layer {layer} of {type(self.module).__name__} has no attention module of transformers' kind; its "
            "attention cannot be read"
        )

    @property
    def attention_name(self) -> str:
        """Name of the attention implementation that the model runs with."""
        config: Any = self.module.config
        return str(config._attn_implementation or "eager")


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a model: the one submodule with `layers`, `rotary_emb` and `norm`.

    Raises:
        UnsupportedError: none, or several.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and isinstance(getattr(module, "rotary_emb", None), nn.Module)
        and hasattr(module, "norm")
    ]
    if len(found) != 1:
        names = ", ".join(type(module).__name__ for module in found) or "none"
        raise UnsupportedError(
            f"{type(model).__name__}: expected exactly one decoder (a module with layers, rotary_emb and norm), "
            f"found {names}; "
            "hand the decoder itself to tokenprune.prune()"
        )
    module = found[0]
    layers: Any = module.layers
    rotary: Any = module.rotary_emb
    return Decoder(module, tuple(layers), rotary)
