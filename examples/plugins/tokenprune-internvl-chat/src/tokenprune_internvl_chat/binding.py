"""Watches a live InternVL with its authors' code: the positions of its image tokens, and what its projector is given.

A picture is cut into tiles, and each tile becomes a square of tokens; every tile counts as an image here. The model's
`generate` calls its language model with embeddings, so that both it and `forward` are watched for the token ids.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import Read, TowerFeatures
from tokenprune.engine import BoundModel, PromptMasks, VisionCapture, padding_mask, shadowed
from tokenprune.errors import InputError


class InternVLChatBinding(BoundModel):
    """One live model."""

    def __init__(self, model: Any) -> None:
        self.name, self.decoder = type(model).__name__, model.language_model.get_decoder()
        self.tower_layers = model.config.vision_config.num_hidden_layers
        self._model = model

    def offers(self) -> frozenset[type[Read]]:
        """What the tower gives to the projector."""
        return frozenset({TowerFeatures})

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[InternVLChatWatch]:
        """Watch the calls of the model and of its projector while the context is open."""
        model, watch = self._model, InternVLChatWatch(self._model, self.name)
        with (
            shadowed(model, "forward", watch.called),
            shadowed(model, "generate", watch.called),
            shadowed(model.mlp1, "forward", watch.projects),
        ):
            yield watch


class InternVLChatWatch(VisionCapture, threading.local):
    """What was seen in one context, by each thread of its own calls.

    Args:
        model: the model.
        name: its name, for messages.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name
        self._inputs: dict[str, Any] = {}
        self._features: Tensor | None = None
        self._counts: list[int] = []

    def called(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's `forward` or `generate`."""
        given = inspect.signature(original).bind_partial(*args).arguments
        self._inputs, self._features = {**given, **kwargs}, None
        return original(*args, **kwargs)

    def projects(self, original: Callable[..., Any], states: Tensor) -> Any:
        """Around the projector: [tiles, tokens, C]."""
        self._features = states.detach()
        return original(states)

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """Where the image tokens are, with their cells.

        Raises:
            InputError: the model does not know its image token yet, or was called without ids.
        """
        ids, token = self._inputs.get("input_ids"), self._model.img_context_token_id
        if token is None:
            raise InputError(
                f"{self._name}: img_context_token_id is not set, which chat() does; set it to "
                "tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        if ids is None:
            raise InputError(f"{self._name}: called without input_ids, so its image tokens are unknown; pass input_ids")
        image_tokens: Tensor = ids == token
        self._counts = image_tokens.sum(1).tolist()
        tile = 1 if self._features is None else self._features.shape[1]
        place = (image_tokens.cumsum(1) - 1).masked_fill(~image_tokens, -1)  # of each image token in its row
        side = math.isqrt(tile)
        inside = place % tile
        grid = torch.stack((inside // side, inside % side), -1).masked_fill(~image_tokens[..., None], -1)
        number = (place // tile).masked_fill(~image_tokens, -1)
        return PromptMasks(image_tokens, queries, grid, number, padding_mask(self._inputs))

    def provide(self, read: Read) -> Tensor:
        """[batch, N, C]: the features of each row's image tokens, zeros behind those of shorter rows."""
        assert self._features is not None, f"{read} was declared, but no image was encoded"
        rows = self._features.flatten(0, 1).split(self._counts)
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
