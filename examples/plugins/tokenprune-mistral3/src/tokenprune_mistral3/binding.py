"""Watches a live Mistral 3: the positions and cells of its image tokens, and the features of its vision tower.

An image is H / 28 rows of W / 28 tokens each. After every row the prompt holds [IMG_BREAK], after the last [IMG_END]:
ordinary text tokens. The calls of the projector show the rows and columns of each image.
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


class Mistral3Binding(BoundModel):
    """One live model, as it is without its language-model head."""

    def __init__(self, base: Any) -> None:
        self.name, self.decoder = type(base).__name__, base.language_model
        self.tower_layers = base.config.vision_config.num_hidden_layers
        self._base = base

    def offers(self) -> frozenset[type[Read]]:
        """What the tower gives to the projector."""
        return frozenset({TowerFeatures})

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[Mistral3Watch]:
        """Watch the calls of the model and of its projector while the context is open."""
        config = self._base.config
        patch, merge = config.vision_config.patch_size, config.spatial_merge_size
        watch = Mistral3Watch(self.name, config.image_token_id, patch, merge, TowerFeatures() in reads)
        base, projector = self._base, uncompiled(self._base.multi_modal_projector)
        with (
            shadowed(base, "forward", partial(watch.called, base)),
            shadowed(projector, "forward", partial(watch.projects, projector)),
        ):
            yield watch


class Mistral3Watch(VisionCapture, threading.local):
    """What was seen in one context, by each thread of its own calls.

    Args:
        name: of the model, for messages.
        image_token: its id.
        patch: pixels of a patch of the tower, each way.
        merge: patches of an image token, each way.
        keep: whether the tower's features will be read.
    """

    def __init__(self, name: str, image_token: int, patch: int, merge: int, keep: bool) -> None:
        self._name, self._image_token, self._patch, self._merge, self._keep = name, image_token, patch, merge, keep
        self._inputs: dict[str, Any] = {}
        self._sizes: list[tuple[int, int]] = []  # of each image in rows and columns of tokens
        self._features: Tensor | None = None
        self._image_tokens: Tensor

    def called(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the model's forward."""
        self._inputs = arguments(module, args, kwargs)
        return original(*args, **kwargs)

    def projects(self, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the projector's forward, which is before the decoder's; `generate` may run it before the model's."""
        given = arguments(module, args, kwargs)
        patches = [(int(height) // self._patch, int(width) // self._patch) for height, width in given["image_sizes"]]
        self._sizes = [(rows // self._merge, columns // self._merge) for rows, columns in patches]
        if self._keep:
            self._features = torch.cat(
                [
                    self._pooled(states, size)
                    for states, size in zip(
                        given["image_features"].detach().split([rows * columns for rows, columns in patches]),
                        patches,
                        strict=True,
                    )
                ]
            )
        return original(*args, **kwargs)

    def _pooled(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        """[patches, C] -> [tokens, C]: the mean of the patches of each token; those that fill none are left out."""
        grid = states.view(*size, -1).movedim(-1, 0)[None]
        return nn.functional.avg_pool2d(grid, self._merge).flatten(2)[0].T

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        """Where the image tokens stand, with their cells.

        Raises:
            InputError: the model was called without ids, or with another number of image tokens than its images have.
        """
        ids = self._inputs.get("input_ids")
        if ids is None:
            raise InputError(f"{self._name}: called without input_ids, so its image tokens are unknown; pass input_ids")
        image_tokens: Tensor = ids == self._image_token
        found, made = int(image_tokens.sum()), sum(rows * columns for rows, columns in self._sizes)
        if found not in (0, made):
            raise InputError(
                f"{self._name}: the prompt holds {found} image tokens, but its images give {made}; use the model's "
                "own processor, and make one row of the batch for each answer"
            )
        grid = ids.new_full((*ids.shape, 2), -1)
        number = torch.full_like(ids, -1)
        if found:
            cells = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in self._sizes]
            numbers = torch.arange(len(cells)).repeat_interleave(torch.tensor([len(part) for part in cells]))
            grid[image_tokens] = torch.cat(cells).to(ids)
            number[image_tokens] = numbers.to(ids)
            first = number.masked_fill(number < 0, len(cells)).amin(1, keepdim=True)
            number = torch.where(image_tokens, number - first, -1)  # counted in each row of the batch
        self._image_tokens = image_tokens
        return PromptMasks(image_tokens, queries, grid, number, padding_mask(self._inputs))

    def provide(self, read: Read) -> Tensor:
        """[batch, N, C]: the features of each row's image tokens, zeros behind those of shorter rows."""
        assert self._features is not None, f"{read} was declared when the context was opened"
        rows = self._features.split(self._image_tokens.sum(1).tolist())
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
