"""Following a live vision-language model of transformers: where its image tokens stand, what its tower computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.binding import Binding, Watch, arguments, padding_mask
from tokenprune.engine.marks import Marks
from tokenprune.engine.tap import Seen, tap
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.layout import true_positions
from tokenprune.reads import ClsAttention, Projector, Read, ReceivedAttention, TowerFeatures, TowerKeys
from tokenprune_adapters import tower_reads
from tokenprune_adapters.transformers_vlm.cells import Cells
from tokenprune_adapters.transformers_vlm.families import Family
from tokenprune_adapters.transformers_vlm.shadow import shadowed

ATTENTION = ("self_attn", "attn", "attention")
METHODS = {"image": "get_image_features", "video": "get_video_features"}


class TransformersBinding(Binding):
    """A vision-language model of transformers.

    Args:
        base: the model without its language-modelling head.
        family: what is special about it.

    Raises:
        UnsupportedError: the model lacks a part that its family has.
    """

    def __init__(self, base: Any, family: Family) -> None:
        self.base, self.family, self.name = base, family, type(base).__name__
        decoder = getattr(base, "language_model", None) or getattr(base, "text_model", None)
        tower = self.part(family.tower)
        if decoder is None:
            raise UnsupportedError(f"{self.name} has no language model inside, expected one ({family.title})")
        self.decoder = decoder
        inner = getattr(tower, "vision_model", tower)  # nested in older releases of transformers
        self.blocks = list(_follow(inner, family.blocks, self.name))
        self.tower_layers = len(self.blocks)
        config = base.config
        cuts = getattr(config, "vision_feature_select_strategy", "full") == "default"
        self.cut = int(cuts)
        names = {name for name, _ in inner.named_parameters()}
        self.has_cls = cuts and any(name.endswith(("class_embedding", "cls_token")) for name in names)
        self.token_ids = {
            "image": getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None),
            "video": getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None),
        }

    def part(self, path: str) -> Any:
        """A module inside the model. Raises UnsupportedError if it is not there."""
        return _follow(self.base, path, self.name)

    def offers(self) -> frozenset[type[Read]]:
        """Everything but pixels; [CLS] where the tower has one, the projector where it works token by token."""
        extra = {ClsAttention: self.has_cls, Projector: self.family.images.projects}
        return frozenset((TowerFeatures, ReceivedAttention, TowerKeys, *(kind for kind, has in extra.items() if has)))

    @contextmanager
    def watch(self, reads: Collection[Read]) -> Iterator[Watch]:
        """See `Binding.watch`. The methods that make image features are looked at on this one object meanwhile."""
        following = _Following(self, reads)
        with ExitStack() as undo:
            undo.callback(self.base.register_forward_pre_hook(following.called, with_kwargs=True).remove)
            for modality, method in METHODS.items():
                undo.enter_context(shadowed(self.base, method, partial(following.encode, modality)))
            yield following

    def project(self, features: Tensor) -> Tensor:
        """[B, k, C] -> [B, k, width], see `tokenprune.reads.Projector`."""
        return self.family.images.project(self.part(self.family.images.projector), features)


@dataclass(frozen=True)
class Encoded:
    """What one call of the tower gave.

    Attributes:
        cells: of the tokens.
        values: per read, [T, …].
    """

    cells: Cells
    values: dict[Read, Tensor]


class _Following:
    """The watch of one context; forgets what it saw once a prefill has taken it."""

    def __init__(self, binding: TransformersBinding, reads: Collection[Read]) -> None:
        self.binding = binding
        self.reads = [read for read in reads if type(read) in binding.offers()]
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._pending: dict[str, Encoded] = {}
        self._encoded: dict[str, Encoded] = {}
        self._flat: Tensor
        self._tokens: Tensor

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note ids and padding."""
        inputs = arguments(module, args, kwargs)
        self._ids, self._mask = inputs.get("input_ids"), padding_mask(inputs)

    def encode(self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the tower and the projector, and keep what the strategy wants to read."""
        binding = self.binding
        kind = binding.family.images if modality == "image" else binding.family.videos
        if kind is None:
            raise UnsupportedError(f"{binding.name}: {modality}s are not supported under tokenprune.prune()")
        inputs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
        arrangement = kind(binding.base, inputs, binding.cut)
        seen: dict[Read, list[Tensor]] = {read: [] for read in self.reads}
        shapes: list[tuple[int, ...]] = []
        given: list[Tensor] = []
        wants_features = any(isinstance(read, TowerFeatures) for read in self.reads)

        def projected(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            shapes.append(tuple(args[0].shape))
            if wants_features:
                given.append(args[0].detach())

        with ExitStack() as undo:
            undo.callback(binding.part(kind.projector).register_forward_hook(projected).remove)
            undo.enter_context(arrangement.recording())
            undo.enter_context(tap(self._shows(seen)))
            output = original(*args, **kwargs)
        features = getattr(output, "pooler_output", output)
        tokens = sum(part.shape[:-1].numel() for part in ([features] if isinstance(features, Tensor) else features))
        cells = arrangement.cells(tokens, sum(shape[0] for shape in shapes))
        values = {read: arrangement.pool(parts, tokens) for read, parts in seen.items() if parts}
        values.update({read: arrangement.features(given, tokens) for read in self.reads if type(read) is TowerFeatures})
        self._pending[modality] = Encoded(cells, {read: _flat(read, value) for read, value in values.items()})
        return output

    def _shows(self, seen: dict[Read, list[Tensor]]) -> dict[nn.Module, Callable[[Seen], None]]:
        layers: dict[int, list[Any]] = {}
        for read in seen:
            if isinstance(read, (ClsAttention, ReceivedAttention, TowerKeys)):
                layers.setdefault(self._layer(read.layer), []).append(read)

        def show(reads: list[Any], found: Seen) -> None:
            for read in reads:
                seen[read].append(self._value(read, found))

        return {
            _attention(self.binding.blocks[n], self.binding.name): partial(show, some) for n, some in layers.items()
        }

    def _layer(self, layer: int) -> int:
        total = self.binding.tower_layers
        if not -total <= layer < total:
            raise InputError(f"tower layer {layer} was asked for, but the vision tower has {total} layers")
        return layer % total

    def _value(self, read: Read, seen: Seen) -> Tensor:
        """[crops, patches, D] of one call of a tower layer."""
        if isinstance(read, ClsAttention):
            return tower_reads.cls_attention(seen, read.heads)[..., None]
        value = (
            tower_reads.keys(seen) if isinstance(read, TowerKeys) else tower_reads.received_attention(seen)[..., None]
        )
        return value[:, self.binding.cut :]

    # the prefill -----------------------------------------------------------------------------------------------------

    def marks(self, queries: Mapping[str, Tensor]) -> Marks:
        """See `Watch.marks`.

        Raises:
            InputError: the model was called without ids, or placeholders and image features differ in number.
        """
        ids, name = self._ids, self.binding.name
        if ids is None:
            raise InputError(f"{name} was called without input_ids; call it with them, or give image_tokens=")
        self._encoded, self._pending = self._pending, {}
        flat = torch.full(ids.shape, -1, device=ids.device)
        start, parts = 0, []
        for modality, token in self.binding.token_ids.items():
            where = ids == token if token is not None else torch.zeros_like(ids, dtype=torch.bool)
            encoded = self._encoded.get(modality)
            if encoded is None:
                if where.any():
                    raise InputError(
                        f"{name}: the prompt holds {int(where.sum())} {modality} tokens, but no {modality} was encoded "
                        "in this context; pass the pixels, or give image_tokens="
                    )
                continue
            flat[where] = _numbers(where, len(encoded.cells), name, modality).to(ids.device) + start
            parts.append(encoded.cells)
            start += len(encoded.cells)
        cells = Cells.joined(parts)
        self._flat = flat
        found = flat.clamp(min=0)
        separator = torch.cat((cells.separator, torch.zeros(1).bool())).to(ids.device)[found]
        self._tokens = (flat >= 0) & ~separator
        grid, image = (
            torch.cat((value, value.new_zeros(1, *value.shape[1:]))).to(ids.device)[found]
            for value in (cells.grid, cells.image)
        )
        number = _numbered(torch.where(self._tokens, image, -1))
        grid = torch.where(self._tokens[..., None], grid, -1)
        return Marks(self._tokens, queries, grid, number, self._mask)

    def provide(self, read: Read) -> Any:
        """See `Watch.provide`."""
        if isinstance(read, Projector):
            return self.binding.project
        parts = [encoded.values.get(read) for encoded in self._encoded.values()]
        values = torch.cat([part for part in parts if part is not None])
        slots = true_positions(self._tokens)
        index = self._flat.gather(1, slots.clamp(min=0)).to(values.device)
        lined = values[index]
        return lined.masked_fill((slots < 0).to(values.device).view(*slots.shape, *[1] * (lined.dim() - 2)), 0)


def _flat(read: Read, value: Tensor) -> Tensor:
    return value.squeeze(-1) if isinstance(read, (ClsAttention, ReceivedAttention)) else value


def _follow(thing: Any, path: str, name: str) -> Any:
    for step in path.split("."):
        if not hasattr(thing, step):
            raise UnsupportedError(f"{name} has no {path}, which models of its family have; it cannot be pruned")
        thing = getattr(thing, step)
    return thing


def _attention(block: nn.Module, name: str) -> nn.Module:
    for child in ATTENTION:
        if isinstance(getattr(block, child, None), nn.Module):
            return getattr(block, child)  # type: ignore[no-any-return]
    raise UnsupportedError(f"{name}: {type(block).__name__} has none of {', '.join(ATTENTION)}, so it cannot be read")


def _numbers(where: Tensor, tokens: int, name: str, modality: str) -> Tensor:
    """For each placeholder, row by row, the number of its token; rows may be repeated for returned sequences."""
    total = int(where.sum())
    repeats = total // tokens if tokens else 0
    if not tokens or total % tokens or len(where) % repeats:
        raise InputError(
            f"{name}: the prompt holds {total} {modality} tokens, but its {modality}s give {tokens} features; use the "
            "model's own processor to make the prompt"
        )
    counts = where.sum(1)[::repeats].tolist()
    rows = torch.split(torch.arange(tokens), counts)
    return torch.cat([row for row in rows for _ in range(repeats)])


def _numbered(image: Tensor) -> Tensor:
    """Number the pictures of every row 0, 1, … in the order in which they come; −1 stays."""
    result = torch.full_like(image, -1)
    for row, numbers in enumerate(image):
        where = (numbers >= 0).nonzero().flatten()
        if len(where):
            found = numbers[where]
            changes = torch.cat((found.new_zeros(1), (found[1:] != found[:-1]).long()))
            result[row, where] = changes.cumsum(0)
    return result
