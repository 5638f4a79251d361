"""How patches become image tokens in models of transformers whose tower takes crops of one size, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.engine.calls.interception import shadowed
from tokenprune_adapters.hf.arrangements.grid_cells import Cells


class Arrangement:
    """The default: the tower runs on a batch of square crops, whose patches become tokens in row-major order.

    Patches may be pooled k × k. There is one instance for each call of the model's `get_image_features` or
    `get_video_features`; subclasses override what differs.

    Args:
        base: the model without its language-modelling head.
        inputs: the call's arguments, by name.
        cut: number of leading positions of the tower's output that are not patches and are removed ([CLS]).
    """

    reads_tower: ClassVar[bool] = True
    """Whether values of the tower's patches can be mapped to image tokens; see `unread`."""
    projects: ClassVar[bool] = True
    """Whether the projector works token by token."""

    def __init__(self, base: Any, inputs: dict[str, Any], cut: int) -> None:
        self.base, self.inputs, self.cut = base, inputs, cut

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Opened around the call, to record further data."""
        yield

    def tokens(self, returned: int) -> int:
        """Number of image tokens of the call, given the number of features that it returned."""
        return returned

    def cells(self, tokens: int, crops: int) -> Cells:
        """Images and grid cells of the image tokens, after the call.

        Args:
            tokens: number of image tokens.
            crops: number of crops in the projector's input.
        """
        return Cells.joined([Cells.square(tokens // crops)] * crops)

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """From patches to image tokens: mean over the patches of a token.

        Args:
            values: [crops, patches, D] for each call of the tower's attention.
            tokens: number of image tokens.

        Returns:
            [tokens, D].
        """
        crops = torch.cat(list(values))
        patches = crops.shape[1]
        k = round((crops.shape[0] * patches / tokens) ** 0.5)
        if k > 1:
            side = round(patches**0.5)
            square = crops.transpose(1, 2).reshape(len(crops), -1, side, side)
            crops = functional.avg_pool2d(square, k).flatten(2).transpose(1, 2)
        return crops.flatten(0, 1)

    def given(self, states: Tensor, *others: Tensor) -> Tensor:
        """The input of one call of the projector, by its arguments: [crops, patches, C]."""
        return states

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The projector's input for each image token: [tokens, C]."""
        rows = sum(part.shape[:-1].numel() for part in given)
        return torch.cat([part.flatten(0, -2) for part in given]) if rows == tokens else self.pool(given, tokens)

    @classmethod
    def project(cls, projector: nn.Module, features: Tensor) -> Tensor:
        """[B, k, C] to [B, k, width], token by token."""
        projected: Tensor = projector(features)
        return projected

    @classmethod
    def embed(cls, base: Any, projected: Tensor) -> Tensor:
        """From the projector's output to image tokens: [B, k, width] each."""
        return projected


class Squares(Arrangement):
    """Aya Vision: the projector takes a crop's patches, and makes a token of each k × k of them."""

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The patches of a token concatenated, in row-major order: [tokens, k · k · C]."""
        crops = torch.cat(list(given))
        side = round(crops.shape[1] ** 0.5)
        k = round((crops.shape[0] * crops.shape[1] / tokens) ** 0.5)
        square = crops.reshape(len(crops), side // k, k, side // k, k, -1)
        return square.transpose(2, 3).reshape(tokens, -1)

    @classmethod
    def project(cls, projector: nn.Module, features: Tensor) -> Tensor:
        """Project with the projector, whose input is a crop for each token."""
        k = int(projector.downsample_factor)  # type: ignore[arg-type]
        projected: Tensor = projector(features.reshape(features.shape[:2].numel(), k * k, -1))
        return projected.reshape(*features.shape[:2], -1)


class Shuffled(Arrangement):
    """Granite Docling: the connector makes a token of k × k patches, and adds to it where it is in its tile."""

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The tokens with their places, before the rest of the connector: [tokens, width]."""
        connector = self.base.vision_model.connector
        path = connector.coarse if self.inputs.get("tile_fine_mask") is None else connector.fine
        with torch.no_grad():
            placed: Tensor = path(connector.ln_in(torch.cat(list(given))), [])[0]
        return placed.flatten(0, 1)

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """The rest of the connector, token by token."""
        projected: Tensor = projector.ln_out(projector.mlp_fc2(functional.gelu(projector.ln_mid(features))))
        return projected


class NormedPool(Arrangement):
    """Gemma 3: average pooling, norm and a matrix in one module."""

    @classmethod
    def project(cls, projector: Any, features: Tensor) -> Tensor:
        """[B, k, C] to [B, k, width]: the steps of the module after pooling."""
        normed: Tensor = projector.mm_soft_emb_norm(features)
        projected: Tensor = normed @ projector.mm_input_projection_weight
        return projected.to(features.dtype)


class Tiled(Arrangement):
    """LLaVA-NeXT's anyres: the whole image, then its tiles joined and unpadded, with a separator after each line.

    The whole image and the joined tiles count as two images, since they have different grids (ours). Values are packed
    by the model's own code. LLaVA-OneVision shrinks large images after the projector: features are shrunk in the same
    way, and their projection is close to the image tokens but not equal.
    """

    def __init__(self, base: Any, inputs: dict[str, Any], cut: int) -> None:
        super().__init__(base, inputs, cut)
        self._pack: Callable[[list[Tensor]], list[Tensor]] = list
        self._crops: list[int] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the number of crops of each image, and how they are packed."""

        def note(original: Callable[..., Any], image_features: Any, *args: Any, **kwargs: Any) -> Any:
            self._crops = [len(crops) for crops in image_features]
            self._pack = partial(_pack, original, args, kwargs)
            return original(image_features, *args, **kwargs)

        with shadowed(self.base, "pack_image_features", note):
            yield

    def cells(self, tokens: int, crops: int) -> Cells:
        """Lines are found from the separators, which are packed as zeros among ones."""
        side = self.side
        flags = self._pack([torch.ones(n, side * side, 1) for n in self._crops])
        return Cells.joined([_tiled(flag.flatten() == 0, n, side) for flag, n in zip(flags, self._crops, strict=True)])

    @property
    def side(self) -> int:
        """Tokens of a crop, each way."""
        return int(self.base.config.vision_config.image_size // self.base.config.vision_config.patch_size)

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Separators get zeros."""
        return torch.cat(self._pack(list(torch.split(torch.cat(list(values)), self._crops))))

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The projector's input, packed like the image tokens."""
        return self.pool(given, tokens)


class Queried(Tiled):
    """Granite 4 Vision: as LLaVA-NeXT; queries, each of which sees the patches of its window, make fewer tokens.

    A token stands where the patches lie of which its query is made.
    """

    projects: ClassVar[bool] = False

    @property
    def side(self) -> int:
        """See `Tiled.side`."""
        return int(super().side * Fraction(self.base.config.downsample_rate))

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the area of a token; separators get zeros."""
        crops = torch.cat(list(values))
        square = crops.transpose(1, 2).reshape(len(crops), -1, super().side, super().side)
        shrunk = functional.interpolate(square, size=(self.side,) * 2, mode="area")
        return super().pool([shrunk.flatten(2).transpose(1, 2)], tokens)


class Indexed(Arrangement):
    """Molmo 2: the inputs tell the patches of each token, of the whole image first, then of its tiles put together."""

    projects: ClassVar[bool] = False

    def cells(self, tokens: int, crops: int) -> Cells:
        """The whole image and the joined tiles count as two images."""
        return Cells.joined([Cells.lines(*size) for size in self.inputs["image_grids"].view(-1, 2).tolist()])

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Mean over the patches of a token, −1 for none."""
        patches = torch.cat([value.flatten(0, 1) for value in values])
        index = self.inputs["image_token_pooling"].to(patches.device)
        exists = index >= 0
        sums = (patches[index.clamp(min=0)] * exists[..., None]).sum(1)
        means: Tensor = (sums / exists.sum(1, keepdim=True).clamp(min=1))[exists.any(1)]
        return means


class Frames(Arrangement):
    """LLaVA-OneVision's videos: frames are shrunk by the model's own pooling, and a separator ends each video."""

    def tokens(self, returned: int) -> int:
        """Includes the separators, which older releases of transformers add after the call."""
        videos, frames = self._pixels().shape[:2]
        vision = self.base.config.vision_config
        side = -(-(vision.image_size // vision.patch_size) // 2)
        return int(videos * (frames * side**2 + 1))

    def cells(self, tokens: int, crops: int) -> Cells:
        """Each frame is an image."""
        videos, frames = self._pixels().shape[:2]
        one = [Cells.square((tokens // videos - 1) // frames)] * frames
        return Cells.joined([*one, Cells.lone_separator()] * videos)

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """Pooled with the model's own pooling; separators get zeros."""
        pooled: Tensor = self.base.apply_pooling(torch.cat(list(values)))
        videos = self._pixels().shape[0]
        lines = pooled.reshape(videos, -1, pooled.shape[-1])
        return functional.pad(lines, (0, 0, 0, 1)).flatten(0, 1)

    def features(self, given: Sequence[Tensor], tokens: int) -> Tensor:
        """The projector's input, pooled like the image tokens."""
        return self.pool(given, tokens)

    def _pixels(self) -> Tensor:
        """[videos, frames, 3, height, width]; in older releases of transformers the argument is `pixel_values`."""
        name = "pixel_values_videos" if "pixel_values_videos" in self.inputs else "pixel_values"
        pixels: Tensor = self.inputs[name]
        return pixels


class ClsFrames(Arrangement):
    """Video-LLaVA's videos: each frame is a crop, and its tokens begin with its [CLS], which counts as text."""

    def cells(self, tokens: int, crops: int) -> Cells:
        """Each frame is an image."""
        patches = Cells.square(tokens // crops - self.cut)
        return Cells.joined([Cells.lone_separator(), patches] * crops if self.cut else [patches] * crops)

    def pool(self, values: Sequence[Tensor], tokens: int) -> Tensor:
        """[CLS] gets zeros."""
        return functional.pad(torch.cat(list(values)), (0, 0, self.cut, 0)).flatten(0, 1)


def _pack(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Tensor]
) -> list[Tensor]:
    newline = values[0].new_zeros(values[0].shape[-1])
    given = {**kwargs, "image_newline": newline} if kwargs.get("image_newline") is not None else kwargs
    packed = original(values, *args, **given)
    return list(packed[0] if isinstance(packed, tuple) else packed)


def _tiled(separator: Tensor, crops: int, side: int) -> Cells:
    whole = Cells.lines(side, side)
    rest = separator[len(whole) :]
    if crops == 1:
        return Cells.joined([whole, Cells.lone_separator()]) if len(rest) else whole
    ends = rest.nonzero().flatten()
    if not len(ends):
        return Cells.joined([whole, Cells.square(len(rest))])
    return Cells.joined([whole, Cells.lines(len(ends), int(ends[0]), separated=True)])
