"""The image side of a segmentation model: from a picture through its towers, once for all queries."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from tokenprune.engine import model_turn
from tokenprune.utils.images import ImageInput
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.segmentation.image_cache import ImageCache

_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_turn(method: _Method) -> _Method:
    """Decorate a model's method to run within a turn, see `tokenprune.engine.model_turn`."""

    @functools.wraps(method)
    def safe(self: ImageEncoding, *args: Any, **kwargs: Any) -> Any:
        with model_turn(self.decoder.model):
            return method(self, *args, **kwargs)

    return safe  # type: ignore[return-value]


class ImageEncoding(ABC):
    """The methods of a segmentation model that encode images. A family implements `prepare_image` and
    `encode_prepared`, and names the classes of their results."""

    prepared_type: ClassVar[type]
    """Of the results of `prepare_image`."""
    encoded_type: ClassVar[type]
    """Of the results of `encode_image`, see `segmentation.Encoded`."""
    decoder: Any
    image_cache: ImageCache

    @abstractmethod
    def prepare_image(self, image: ImageInput) -> Any:
        """The image in pixels, before any tower (a dataclass, see `segmentation.Prepared`). Runs no module, so that
        several threads may prepare images at once.

        Raises:
            InputError: not an image.
        """

    @abstractmethod
    def encode_prepared(self, images: Sequence[Any]) -> list[Any]:
        """What `encode_image` returns, for each of several images from `prepare_image`; the towers run once."""

    @in_turn
    def encode_image(self, image: Any) -> Any:
        """Compute everything that depends only on the image. A prepared image goes through the towers, an encoded one
        is returned unchanged.

        Raises:
            InputError: not an image.
        """
        if isinstance(image, self.encoded_type):
            return image
        with stage("preprocess"):
            prepared = image if isinstance(image, self.prepared_type) else self.prepare_image(image)
        return self.encode_prepared([prepared])[0]

    @torch.inference_mode()
    @in_turn
    def encoded(self, image: Any) -> Any:
        """As `encode_image`, from `image_cache` if the same picture was encoded lately. Preserves no gradients."""
        assert isinstance(self, nn.Module)
        modules = [module for module in self.children() if module is not self.decoder]
        return self.image_cache.encoded(image, modules, self.encode_image)
