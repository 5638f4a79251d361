"""What is timed: the decoder of a loaded model, or one of given sizes with random weights, on random states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.cost import DecoderSpec
from tokenprune.engine import prune
from tokenprune.engine.calls.wrappers import modules_of, unwrapped
from tokenprune.engine.decoder import Decoder, find_decoder
from tokenprune.engine.interface.compatibility import Declared, check_on, declaration_of
from tokenprune.errors import OptionError
from tokenprune.recommendation.rounds import Cell
from tokenprune.recommendation.vision import LAYERS, RandomVision

POSITIONS = 1 << 17  # of a decoder of random weights: its rotary embedding has no limit of its own


class MeasuredDecoder:
    """A decoder with a random vision side.

    Args:
        model: a model as `tokenprune.load` gives it, or what `prune` takes.
        text_tokens: tokens of the prompt beside the image's; half of them come before it.

    Attributes:
        tower_tokens: patches of the vision tower, which most models take as image tokens; None = not known.

    Raises:
        UnsupportedError: no adapter supports the model, or it contains no decoder.
    """

    def __init__(self, model: Any, text_tokens: int) -> None:
        self.declared: Declared = declaration_of(model)
        self.name = self.declared.name
        self._found: Decoder = find_decoder(self.declared.decoder)
        self.module = self._found.module
        self.text_tokens = text_tokens
        # weights may be quantised to integers, norms are not
        parameter = next(one for one in self.module.parameters() if one.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.hidden = int(self.module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        tower = _tower_config(unwrapped(model))
        self.tower_tokens = _patches(tower)
        sizes = {} if tower is None else {"width": int(tower.hidden_size)}
        layers = self.declared.tower_layers or LAYERS
        self._vision = RandomVision(self.hidden, self.dtype, self.device, layers=layers, **sizes)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._found.layers)

    @property
    def most_image_tokens(self) -> int:
        """The longest prompt that the decoder's positions allow, without the text."""
        most = getattr(self.module.config, "max_position_embeddings", None) or POSITIONS
        return int(most) - self.text_tokens

    def check(self, strategy: Strategy) -> None:
        """Raise IncompatibleError if the model does not provide a strategy's reads."""
        check_on(strategy, self.declared, self._found)

    def cell(self, image_tokens: int, batch: int, strategies: dict[int, Strategy], traces: dict[int, Trace]) -> Cell:
        """Prefills of a batch of prompts with that many image tokens each.

        Args:
            image_tokens: of each row.
            batch: rows.
            strategies: by number.
            traces: filled with the latest trace of each strategy.
        """
        length, before = self.text_tokens + image_tokens, self.text_tokens // 2
        draw = torch.Generator().manual_seed(0)
        embeds = torch.randn(batch, length, self.hidden, generator=draw).to(self.device, self.dtype)
        marks = torch.zeros(batch, length, dtype=torch.bool)
        marks[:, before : before + image_tokens] = True
        last = torch.zeros(batch, length, dtype=torch.bool)
        last[:, -1] = True
        side = math.ceil(math.sqrt(image_tokens))  # not every number is a square: the last row of cells may be shorter
        place = (torch.arange(length) - before).clamp(0, image_tokens - 1)
        grid = torch.stack((place // side, place % side), -1).expand(batch, -1, -1)
        vision = self._vision.source(batch, image_tokens, self.declared.offers())

        def prefill() -> None:
            self.module(inputs_embeds=embeds, use_cache=False)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        def pruned(number: int, strategy: Strategy) -> None:
            rows = {"mask_query": last, "seg": last}
            with prune(self.module, strategy, image_tokens=marks, queries=rows, grid=grid, vision=vision) as run:
                prefill()
            traces[number] = run.trace

        runs: dict[int, Callable[[], object]] = {
            number: partial(pruned, number, strategy) for number, strategy in strategies.items()
        }
        return Cell(image_tokens, batch, prefill, runs)


def random_decoder(
    spec: DecoderSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """A Llama of these sizes. All layers share one layer's weights, so that it takes the memory of one.

    Args:
        spec: its sizes; those of `lm_head` do not matter, since it does not run.
        dtype, device: of the weights.

    Raises:
        OptionError: the device has too little memory for one layer.
    """
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": POSITIONS,
        "attn_implementation": "sdpa",
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaModel(LlamaConfig(**sizes))
            nn.Module.to(model, device, dtype)
    except torch.OutOfMemoryError as error:
        raise OptionError(f"decoder of width {spec.hidden}: one layer exceeds the memory of {device}") from error
    model.eval()
    first = model.layers[0]
    shared: dict[int, Any] = {id(part): part for part in (model.config, *first.parameters())}
    for number in range(1, spec.layers):
        layer = copy.deepcopy(first, dict(shared))
        layer.self_attn.layer_idx = number
        model.layers.append(layer)
    model.config.num_hidden_layers = spec.layers
    made: nn.Module = model
    return made


class RandomModel:
    """A decoder of random weights as a model: it declares every read that can be answered at random."""

    tower_layers = LAYERS

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: str, name: str = "") -> None:
        self.name = name or f"random weights, {spec.layers} layers of width {spec.hidden}"
        self.decoder = random_decoder(spec, dtype, device)

    def offers(self) -> frozenset[Any]:
        """See `Declared`."""
        return RandomVision.kinds()


def _tower_config(model: Any) -> Any:
    """The configuration of a model's vision tower: of its first part that has patches; None without one."""
    if not isinstance(model, nn.Module):
        return None
    for part in modules_of(model):
        config: Any = getattr(part, "config", None)
        if getattr(config, "patch_size", None) and isinstance(getattr(config, "hidden_size", None), int):
            return config
    return None


def _patches(config: Any) -> int | None:
    """Patches of a tower's input, which most models take as image tokens."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else None
