"""Scores of places in an image, which were measured beforehand.

Examples:
    A map of 2 × 2 cells on the grid of an image of 2 × 4 tokens:

    >>> import tokenprune as tp
    >>> prior = tp.PositionPrior([[0, 4], [8, 8]])
    >>> prior
    PositionPrior(2 × 2)
    >>> prior.resized(2, 4).tolist()
    [[0.0, 1.0, 3.0, 4.0], [8.0, 8.0, 8.0, 8.0]]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenprune.core.reads.base import Read
from tokenprune.errors import InputError
from tokenprune.utils.arguments import instance, shown, whole_number
from tokenprune.utils.files import absent, path_given, replacing

if TYPE_CHECKING:  # what a strategy requires is known without torch
    from torch import Tensor

    from tokenprune.core.layout import SequenceLayout

NAME = "position_prior"


@dataclass(frozen=True, repr=False)
class PositionPrior(Read):
    """`tokens.position_prior`: float32 [batch, N], the score that a stored map has at each token's place in its image.

    The map is spread over the whole grid of each image: resized to its rows and columns, bilinearly, and where the grid
    is the smaller one with weights that take in every cell of the map (ours). Images of one row have the map each; so
    do crops that are images of their own, while tiles that the model joins into one grid share it. Zeros where a row
    has no token.

    Attributes:
        scores: `[rows][columns]`, finite numbers; a tensor, an array or lists are made into tuples of tuples.

    Raises:
        InputError: something else. When it is read: an image token has no grid cell.
    """

    field: ClassVar[str] = NAME
    scores: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = _checked(self.scores).tolist()
        object.__setattr__(self, "scores", tuple(map(tuple, rows)))  # reads are compared and hashed

    def __repr__(self) -> str:
        return f"PositionPrior({len(self.scores)} × {len(self.scores[0])})"

    @classmethod
    def load(cls, path: str | Path) -> PositionPrior:
        """The map in a .safetensors file that holds one tensor, of any name.

        Raises:
            InputError: there is no such file, or it holds something else; names the file.
        """
        file = path_given("path", path)
        try:
            status = file.stat()
        except OSError:
            raise InputError(f"position prior {absent(file)}") from None
        return _loaded(file, status.st_mtime_ns, status.st_size)

    def save(self, path: str | Path) -> None:
        """Write the map to a .safetensors file. Raises InputError if that is not possible."""
        from safetensors.torch import save

        with replacing(path_given("path", path)) as temporary:
            temporary.write_bytes(save({NAME: _checked(self.scores)}))

    @classmethod
    def mean(cls, maps: Iterable[Any]) -> PositionPrior:
        """The mean of maps [rows, columns]; those of different sizes are resized to the most rows and columns (ours).

        Raises:
            InputError: there is none, or one of them is no map.
        """
        instance("maps", maps, Iterable, "maps [rows, columns]", InputError)
        sums: dict[tuple[int, int], Tensor] = {}  # by size, since there may be many maps
        count = 0
        for count, scores in enumerate(maps, 1):  # noqa: B007 - the last number is how many there are
            found = _checked(scores).double()
            rows, columns = found.shape
            sums[rows, columns] = sums.get((rows, columns), 0) + found
        if not count:
            raise InputError("PositionPrior.mean was given no maps; expected at least one")
        rows, columns = (max(sizes) for sizes in zip(*sums, strict=True))
        return cls(sum(_resized(part, rows, columns) for part in sums.values()) / count)

    def resized(self, rows: int, columns: int) -> Tensor:
        """The map on another grid, float32 [rows, columns]. Raises OptionError for sizes below 1."""
        size = whole_number("rows", rows, 1), whole_number("columns", columns, 1)
        return _resized(_checked(self.scores), *size)

    def at(self, layout: SequenceLayout) -> Tensor:
        """The value of this read. Raises InputError if an image token has no grid cell."""
        import torch

        host = layout.on_host
        images, cells = host.gather_slots(host.image_number), host.gather_slots(host.grid)
        found = torch.zeros(images.shape)
        for row, numbers in enumerate(images):
            for image in sorted({*numbers.tolist()} - {-1}):
                here = numbers == image
                own = cells[row, here]
                if bool((own < 0).any()):
                    raise InputError(
                        f"{self!r}: image {image} of batch row {row} has tokens without a grid cell; give cells "
                        "(`grid=` of tokenprune.prune, or the adapter's PromptMasks), or use a strategy without a prior"
                    )
                found[row, here] = self.resized(*layout.grid_sizes[row, image])[own[:, 0], own[:, 1]]
        return found.to(layout.valid.device, non_blocking=True)


@lru_cache(maxsize=16)  # a budget makes a strategy, and so its reads, many times
def _loaded(file: Path, changed: int, size: int) -> PositionPrior:
    """The map in a file that was last changed then."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"position prior {str(file)!r} cannot be read ({error}); expected a file of PositionPrior.save"
        ) from error
    if len(tensors) != 1:
        raise InputError(
            f"position prior {str(file)!r} holds {len(tensors)} tensors; expected one [rows, columns], as "
            "PositionPrior.save writes"
        )
    try:
        return PositionPrior(*tensors.values())
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from error


def _checked(scores: Any) -> Tensor:
    """A map as a float32 tensor. Raises InputError if it is none."""
    import torch

    try:
        found = torch.as_tensor(scores).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"PositionPrior was given {shown(scores)}; expected numbers [rows, columns]") from None
    if found.dim() != 2 or not found.numel() or found.is_complex():
        raise InputError(
            f"PositionPrior was given {found.dtype} of shape {list(found.shape)}; expected real numbers [rows, columns]"
        )
    found = found.float()
    wrong = (~found.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise InputError(
            f"PositionPrior: {found[row, column]:g} found at row {row}, column {column}; expected finite numbers"
        )
    return found


def _resized(scores: Tensor, rows: int, columns: int) -> Tensor:
    """A float map on another grid. By Pillow: torch's antialiased `interpolate` is wrong for grids of one column."""
    import numpy as np
    import torch
    from PIL import Image

    found = Image.fromarray(scores.float().numpy()).resize((columns, rows), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(found))
