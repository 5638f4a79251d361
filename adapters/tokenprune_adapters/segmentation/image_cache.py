"""The latest images that a model encoded, so that the next query about one of them does not run the towers again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenprune.errors import OptionError
from tokenprune.utils.arguments import shown
from tokenprune.utils.images import to_rgb
from tokenprune.utils.stopwatch import stage


class ImageCache:
    """Encoded images by content: pixels, not file names, and the state of the modules that encode them.

    What was encoded before the modules changed is not found any more: other weights, another device or type, another
    `forward`. Modules in training mode, with hooks, or whose weights are elsewhere are always run.

    Args:
        size: images to remember; 0 turns the cache off. Each holds the features of its towers, and its resized pixels.
    """

    def __init__(self, size: int = 4) -> None:
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        self.size = size

    def __repr__(self) -> str:
        return f"ImageCache({len(self)} of {self.size} images)"

    def __len__(self) -> int:
        return len(self._found)

    def __deepcopy__(self, memo: Any) -> ImageCache:
        return ImageCache(self.size)  # a copied model has weights of its own

    @property
    def size(self) -> int:
        """Images to remember; OptionError unless it is a number from 0."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise OptionError(f"size={shown(size)} found, expected a whole number of images, from 0")
        self._size = size
        self._trim()

    def clear(self) -> None:
        """Forget all images."""
        self._found.clear()

    def encoded(self, image: Any, modules: Sequence[nn.Module], encode: Callable[[Any], Any]) -> Any:
        """What `encode` gives for an image, from the cache if it is there.

        Args:
            image: a picture in any form; anything else, such as an encoded image, is not looked up.
            modules: those that `encode` runs.
            encode: from the image.
        """
        is_picture = isinstance(image, (str, Path, Image.Image, np.ndarray, Tensor))
        state = _state(modules) if self.size and is_picture else None
        if state is None:
            return encode(image)
        with stage("preprocess"):
            rgb = to_rgb(image)
            key = (rgb.size, hashlib.blake2b(rgb.tobytes(), digest_size=16).digest(), state)
        if key not in self._found:
            found = self._found[key] = encode(rgb)
            self._trim()
            return found
        with stage("remembered image"):  # instead of the stages of the towers
            self._found.move_to_end(key)
            return self._found[key]

    def _trim(self) -> None:
        while len(self._found) > self.size:
            self._found.popitem(last=False)


def _state(modules: Sequence[nn.Module]) -> Hashable | None:
    """A value that differs once the modules would give something else; None if they have to run each time."""
    parts: list[Hashable] = []
    firsts: list[Tensor] = []
    for module in modules:
        for part in module.modules():
            if part.training or _is_watched(part):
                return None
            parts.append(id(part.__dict__.get("forward")))  # as a wrapper sets it
        for weight in (*module.parameters(), *module.buffers()):
            if weight.is_meta or weight.is_inference():
                return None
            parts.append((id(weight), weight.data_ptr(), weight._version))
            if weight.numel():  # what is written through `.data` changes no version
                firsts.append(weight.detach()[(0,) * weight.dim()].float().reshape(()))
    values = [value for place in _by_device(firsts) for value in torch.stack(place).tolist()]
    return hash((tuple(parts), tuple(values)))


def _is_watched(part: nn.Module) -> bool:
    """Whether a module has hooks, which have to run with it."""
    kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    # transformers' own, which its models get in their first call, only collect outputs
    owners = [str(getattr(hook, "__module__", "")) for hooks in kinds for hook in hooks.values()]
    return not all(owner.startswith("transformers.") for owner in owners)


def _by_device(values: Sequence[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for value in values:
        found.setdefault(value.device, []).append(value)
    return list(found.values())
