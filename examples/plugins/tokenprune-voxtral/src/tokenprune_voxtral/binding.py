"""Watches a live Voxtral: the positions and cells of its audio tokens, and the features of its audio tower.

A clip of audio is a fixed number of tokens, each of which shows a few frames of the tower. The calls of the projector
show how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import Read, TowerFeatures
from tokenprune.engine import BoundModel, PromptMasks, VisionCapture, arguments, padding_mask, shadowed, uncompiled
from tokenprune.errors import InputError


class VoxtralBinding(BoundModel):
    """One live model, as it is without its language-model head."""

    def __init__(self, base: Any) -> None:
        self.name, self.decoder = type(base).__name__, base.language_model
        self.tower_layers = base.config.audio_config.num_hidden_layers
        self._base = base

    def offers(self) -> frozenset[type[Read]]:
        """What the tower gives to the projector."""
        return frozenset({TowerFeatures})

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VoxtralWatch]:
        """Watch the calls of the model and of its projector while the context is open."""
        watch = VoxtralWatch(self.name, self._base.config.audio_token_id, TowerFeatures() in reads)
        base, projector = self._base, uncompiled(self._base.multi_modal_projector)
        with (
            shadowed(base, "forward", partial(watch.called, base)),
            shadowed(projector, "forward", watch.projects),
        ):
            yield watch


class VoxtralWatch(VisionCapture, threading.local):
    """What was seen in one context, by each thread of its own calls.

    Args:
        name: of the model, for messages.
        audio_token: its id.
        keep: whether the tower's features will be read.
    """

    def __init__(self, name: str, audio_token: int, keep: bool) -> None:
        self._name, self._audio_token, self._keep = name, audio_token, keep
        self._inputs: dict[str, Any] = {}
        self._made = 0  # tokens of all clips
        self._features: Tensor | None = None
        self._audio_tokens: Tensor

    def called(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward."""
        self._inputs, self._made = arguments(module, args, kwargs), 0
        return original(*args, **kwargs)

    def projects(self, original: Callable[..., Any], audio_features: Tensor) -> Any:
        """Around the projector's forward, which is before the decoder's; it is given a row for each token."""
        self._made = len(audio_features)
        if self._keep:
            self._features = audio_features.detach()
        return original(audio_features)

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """Where the audio tokens stand, with their cells: a clip is an image of one line.

        Raises:
            InputError: the model was called without ids, or with another number of audio tokens than its clips have.
        """
        ids = self._inputs.get("input_ids")
        if ids is None:
            raise InputError(f"{self._name}: called without input_ids, so its audio tokens are unknown; pass input_ids")
        audio_tokens: Tensor = ids == self._audio_token
        found = int(audio_tokens.sum())
        if found not in (0, self._made):
            raise InputError(
                f"{self._name}: the prompt holds {found} audio tokens, but its clips give {self._made}; use the "
                "model's own processor, and make one row of the batch for each answer"
            )
        grid, number = ids.new_full((*ids.shape, 2), -1), torch.full_like(ids, -1)
        if found:
            length = found // len(self._inputs["input_features"])
            place = audio_tokens.cumsum(1) - 1  # among the audio tokens of its row
            number = torch.where(audio_tokens, place // length, -1)
            cell = torch.stack((torch.zeros_like(place), place % length), -1)
            grid = torch.where(audio_tokens[..., None], cell, -1)
        self._audio_tokens = audio_tokens
        return PromptMasks(audio_tokens, queries, grid, number, padding_mask(self._inputs))

    def provide(self, read: Read) -> Tensor:
        """[batch, N, C]: the features of each row's audio tokens, zeros behind those of shorter rows."""
        assert self._features is not None, f"{read} was declared when the context was opened"
        rows = self._features.split(self._audio_tokens.sum(1).tolist())
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
