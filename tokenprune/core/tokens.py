"""The view of the image tokens that a strategy works on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.apportion import apportion
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import Crops, Read
from tokenprune.core.reads.base import kinds_of_reads
from tokenprune.core.scheduling.state import TokenState
from tokenprune.errors import PluginError, nearest
from tokenprune.plugins.readonly import ReadOnlyTensors
from tokenprune.utils.host_copies import on_host

if TYPE_CHECKING:
    from tokenprune.core.stage import Stage


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The active tokens of one image, or of one crop of it.

    Attributes:
        row: batch row.
        image: which image of the row, counted from 0.
        index: int64 [n], n >= 1, image-token numbers in ascending order.
        quota: its share of the row's `tokens.target`; at most n.
        index_on_host: `index` in the host's memory, for choices that the host makes.
    """

    row: int
    image: int
    index: Tensor
    quota: int
    index_on_host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)

    def __len__(self) -> int:
        return len(self.index)


class Tokens:
    """The image tokens of every batch row on entering a stage.

    The token axis always holds the *original* image tokens of the row, 0 … N−1 in sequence order: a number means the
    same token in every stage. Rows with fewer than N tokens are padded at the end (`exists` is False there).

    Attributes:
        exists: bool [batch, N].
        active: bool [batch, N], taking part in the layer before this stage.
        parked: bool [batch, N], not active, can be restored.
        counts: int64 [batch], original image tokens per row.
        target: int64 [batch], the number of tokens that the stage declared, −1 if it declared none.
        stages: the stage as declared for each batch row, for stages with further numbers (see `Stage`).
        mass: float32 [batch, N], how many original tokens each one stands for.
        origin: int64 [batch, N], the token whose place in the image each has, −1 for none.
        lineage: bool [batch, N, N], [b, k, j] = token j contributes to token k; None = each is only itself.
        mark: mark(name, rows) makes text tokens, bool [batch, T], query rows of that name for later stages.
        memory: a dict to pass values from stage to stage; it is cleared after the prefill.

    The stage's declared `reads` are attributes too: `attention`, `hidden`, `features`, … (see `tokenprune.core.reads`);
    `tokens.read(...)` distinguishes several reads of one kind. A read that was not declared raises PluginError.

    Examples:
        A `choose` that keeps the first tokens of every image, as many as its share of the stage's number:

        >>> import torch, tokenprune as tp
        >>> from tokenprune.testing.tiny_decoders import tiny_llama
        >>> class First(tp.Strategy):
        ...     name = "first"
        ...
        ...     def stages(self, shape):
        ...         yield tp.Stage("prune", layer=1, tokens=shape.image_tokens // 4)
        ...
        ...     def choose(self, stage, tokens):
        ...         chosen = torch.zeros_like(tokens.active)
        ...         for image in tokens.images():
        ...             chosen[image.row, image.index[: image.quota]] = True
        ...         return tp.Keep.where(chosen)
        >>> marks = torch.tensor([[False] * 4 + [True] * 8 + [False] * 2 + [True] * 4 + [False] * 2])
        >>> model = tiny_llama(layers=4)
        >>> with tp.prune(model, First(), image_tokens=marks) as run:
        ...     logits = model(input_ids=torch.arange(1, 21)[None]).logits
        >>> run.trace.stages[0].kept
        [[0, 1, 8]]
    """

    def __init__(
        self,
        *,
        stage: str,
        layout: SequenceLayout,
        state: TokenState,
        target: Tensor,
        memory: dict[str, Any],
        seed: int,
        reads: Collection[Read],
        provide: Callable[[Read], Any],
        mark: Callable[[str, Tensor], None],
        stages: Sequence[Stage] = (),
        active: Tensor | None = None,
        strict: bool = False,
    ) -> None:
        # copies, which are small: a strategy that modifies one in place must not change the state of the prefill
        self.exists, self.active, self.parked = state.exists.clone(), state.active.clone(), state.parked.clone()
        self.mass, self.origin = state.mass.clone(), state.origin.clone()
        self.lineage = state.lineage
        self.counts = self.exists.sum(1)
        self._target, self._active = target, active
        self.target = target.to(self.exists.device, non_blocking=True).clone()
        self.memory, self.mark, self.stages = memory, mark, stages
        self._layout, self._stage, self._seed, self._reads, self._provide = layout, stage, seed, list(reads), provide
        self._known: dict[Read, Any] = {}
        self._hosted: dict[str, Tensor] = {}
        self._shown = ReadOnlyTensors() if strict else None
        for name in ("exists", "active", "parked", "mass", "origin", "lineage", "target"):
            self._show(name, getattr(self, name))
        hidden = [read for read in self._reads if read.field in self.__dict__ or hasattr(type(self), read.field)]
        if hidden:
            raise PluginError(f"read {hidden[0]}: tokens.{hidden[0].field} is something else; choose another `field`")
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_is_made" in self.__dict__ and not name.startswith("_"):
            how = "; put what a later stage needs into it: tokens.memory['name'] = …" if name == "memory" else ""
            raise PluginError(f"stage {self._stage!r} assigns to tokens.{name}; Tokens cannot be assigned to{how}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        declared = [read for read in self._reads if read.field == name]
        if len(declared) == 1:
            return self.read(declared[0])
        if declared:
            raise PluginError(
                f"stage {self._stage!r} declares {len(declared)} reads that give tokens.{name}; select one with "
                f"tokens.read({declared[0]!r})"
            )
        known = {kind.field: kind.__name__ for kind in kinds_of_reads()}
        if name not in known:
            near = nearest(name, [*known, *(word for word in dir(self) if not word.startswith("_"))], limit=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"Tokens has no attribute {name!r}{hint}")
        raise PluginError(
            f"stage {self._stage!r} reads tokens.{name} without declaring it; add {known[name]}() to the stage's reads"
        )

    def read(self, read: Read) -> Any:
        """The value of one of the stage's declared reads. Raises PluginError for one that was not declared."""
        if read not in self._reads:
            raise PluginError(f"stage {self._stage!r} reads {read!r} without declaring it; add it to the stage's reads")
        if read not in self._known:
            self._known[read] = self._provide(read)
            self._show(read.field, self._known[read])
        return self._known[read]

    def _show(self, name: str, value: Any) -> None:
        if self._shown is not None:
            self._shown.add(name, value)

    @property
    def strict(self) -> bool:
        """Whether in-place writes are detected: `prune(..., strict=True)`."""
        return self._shown is not None

    def check_unwritten(self, who: str) -> None:
        """Raise PluginError, naming the strategy `who`, if a tensor was modified in place; in strict mode only."""
        if self._shown is not None:
            self._shown.check_unwritten(who, self._stage)

    def given(self) -> dict[Read, Any]:
        """The values read so far."""
        return dict(self._known)

    @cached_property
    def image(self) -> Tensor:
        """int64 [batch, N]: image number within the row."""
        return _FROM_LAYOUT["image"](self._layout)

    @cached_property
    def grid(self) -> Tensor:
        """int64 [batch, N, 2]: (row, column) of the cell, −1 where there is none."""
        return _FROM_LAYOUT["grid"](self._layout)

    @cached_property
    def places(self) -> Tensor:
        """int64 [batch, N]: how many real tokens precede each."""
        return _FROM_LAYOUT["places"](self._layout)

    @cached_property
    def text(self) -> Tensor:
        """bool [batch, T]: the text tokens of the row."""
        return _FROM_LAYOUT["text"](self._layout)

    @cached_property
    def text_places(self) -> Tensor:
        """int64 [batch, T]: how many real tokens precede each text token."""
        return _FROM_LAYOUT["text_places"](self._layout)

    @cached_property
    def images_before(self) -> Tensor:
        """int64 [batch, T]: how many image tokens precede each text token."""
        return _FROM_LAYOUT["images_before"](self._layout)

    def on_host(self, name: str) -> Tensor:
        """`tokens.<name>` in the host's memory, for choices that the host makes: it need not wait for a device.

        Args:
            name: "active", "image", "grid", "places", "text", "text_places" or "images_before".
        """
        if name not in self._hosted:
            if name == "active" and self._active is not None:
                self._hosted[name] = self._active.clone()
            elif name in _FROM_LAYOUT:
                self._hosted[name] = _FROM_LAYOUT[name](self._layout.on_host)
            else:
                (self._hosted[name],) = on_host(getattr(self, name))
        return self._hosted[name]

    @property
    def device(self) -> torch.device:
        """The device on which indices and scores must be."""
        return self.active.device

    def images(self, *, least: int = 0) -> list[ImageTokens]:
        """The images of every batch row, row by row, or their crops if the stage reads `Crops`.

        Each active token is in exactly one of them; images without active tokens are left out. A row's target is
        divided over its images (crops) in proportion to their active tokens (ours).

        Args:
            least: minimum quota of an image; if the row's target is too small, the largest images get it.
        """
        return [image for images in self.images_by_row(least=least) for image in images]

    def images_by_row(self, *, least: int = 0) -> list[list[ImageTokens]]:
        """`images`, in a list for each batch row."""
        rows = []
        crops = on_host(self.read(Crops()))[0] if Crops() in self._reads else None
        for row, target in enumerate(self._target.tolist()):
            parts = self._parts(row, None if crops is None else crops[row])
            quotas = apportion(target, [len(index) for _, index in parts], least)
            rows.append(
                [
                    ImageTokens(row, image, index.to(self.device, non_blocking=True), n, index)
                    for (image, index), n in zip(parts, quotas, strict=True)
                ]
            )
        return rows

    def _parts(self, row: int, crop: Tensor | None) -> list[tuple[int, Tensor]]:
        """(image, token numbers on the host) of every image or crop of a row that has active tokens."""
        numbers = self.on_host("image")[row]  # −1 where the row has no token
        known = sorted({*numbers.tolist()} - {-1})
        images = [(numbers.eq(number) & self.on_host("active")[row]).nonzero().flatten() for number in known]
        parts = list(enumerate(images))
        if crop is not None:
            parts = [(image, index[crop[index] == one]) for image, index in parts for one in torch.unique(crop[index])]
        return [(image, index) for image, index in parts if len(index)]

    def grid_size(self, image: ImageTokens) -> tuple[int, int] | None:
        """(rows, columns) of the whole image's grid, whichever of its tokens remain; None if it has no cells."""
        number = int(self.on_host("image")[image.row, image.index_on_host[0]])
        return self._layout.grid_sizes.get((image.row, number))

    def count(self, share: float) -> Tensor:
        """int64 [batch]: floor(share · N_row), at least 1 where share > 0 and the row has image tokens."""
        number = (self.counts * share + 1e-6).floor().long()
        return torch.where(self.counts > 0, number.clamp(min=1 if share > 0 else 0), 0)

    def generator(self, seed: int = 0) -> torch.Generator:
        """A fresh CPU random generator from the option `seed` and the run's own seed.

        Make one per row: a row in a batch then draws the same numbers as alone.
        """
        return torch.Generator().manual_seed(hash((seed, self._seed)) & 0x7FFF_FFFF_FFFF_FFFF)


_FROM_LAYOUT: dict[str, Callable[[SequenceLayout], Tensor]] = {
    "image": lambda layout: layout.gather_slots(layout.image_number),
    "grid": lambda layout: layout.gather_slots(layout.grid),
    "places": lambda layout: layout.gather_slots(layout.places),
    "text": lambda layout: layout.text_slots >= 0,
    "text_places": lambda layout: layout.gather_text(layout.places),
    "images_before": lambda layout: layout.gather_text(layout.image_tokens.long().cumsum(1)),
}
