"""The decisions that a strategy can return at a stage: keep, restore, merge. Plain data over image-token numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tokenprune.core.layout import true_positions
from tokenprune.errors import PluginError

if TYPE_CHECKING:
    from tokenprune.core.tokens import Tokens


class _Index:
    """The field `index` of a decision.

    If it was given as a mask on a device, it is made when it is first asked for: the host has to wait for its size.
    """

    def __get__(self, decision: Any, owner: Any = None) -> Any:
        if decision is None:
            raise AttributeError("index")  # the field has no default
        if "index" not in decision.__dict__:
            decision.__dict__["index"] = true_positions(decision.__dict__["mask"])
        return decision.__dict__["index"]

    def __set__(self, decision: Any, given: Any) -> None:
        if isinstance(given, _Marked):
            decision.__dict__["mask"] = given.mask
        else:
            decision.__dict__["index"] = given


@dataclass(frozen=True)
class _Marked:
    mask: Tensor


@dataclass(frozen=True)
class Decision:
    """A choice for every batch row.

    Attributes:
        index: int64 [batch, k], image-token numbers in ascending order, each row padded at its end with −1.
        values: [batch, k, width], new states for these tokens; None = their states are unchanged.
        scores: float [batch, N], the scores behind the choice, for the trace; NaN is refused.
    """

    index: Tensor = cast(Tensor, _Index())  # noqa: RUF009 - a descriptor, not a default
    values: Tensor | None = field(default=None, kw_only=True)
    scores: Tensor | None = field(default=None, kw_only=True)

    @property
    def mask(self) -> Tensor | None:
        """bool [batch, N], the tokens of `index`, if the decision was given as such a mask on a device; else None."""
        found: Tensor | None = self.__dict__.get("mask")
        return found


@dataclass(frozen=True)
class Keep(Decision):
    """Only these active tokens stay active; the other active ones are dropped for good, or parked.

    Attributes:
        rest: "drop" or "park".

    Examples:
        >>> import torch, tokenprune as tp
        >>> scores = torch.tensor([[0.1, 0.7, 0.2, 0.9]])
        >>> tp.Keep.top(scores, 2).index
        tensor([[1, 3]])
        >>> tp.Keep.where(scores > 0.5, rest="park").rest
        'park'
    """

    rest: str = field(default="drop", kw_only=True)

    @classmethod
    def top(cls, scores: Tensor, count: Tensor | int, *, rest: str = "drop") -> Keep:
        """The `count` tokens of highest score per row (ties: the lower number), back in image order.

        Args:
            scores: float [batch, N]; higher = kept; −inf = never, unless there are too few others.
            count: tokens to keep, one number or int [batch].

        Raises:
            PluginError: scores or counts of another shape.
        """
        return cls(index_of(top_mask(scores, count)), rest=rest, scores=scores)

    @classmethod
    def where(cls, mask: Tensor, *, rest: str = "drop", scores: Tensor | None = None) -> Keep:
        """The tokens that bool [batch, N] marks. Raises PluginError for anything else."""
        return cls(index_of(_marks("Keep", mask)), rest=rest, scores=scores)


@dataclass(frozen=True)
class Restore(Decision):
    """These parked tokens become active again, with the state they had when parked, or with `values`.

    Examples:
        >>> import torch, tokenprune as tp
        >>> tp.Restore.where(torch.tensor([[True, False, True]])).index
        tensor([[0, 2]])
    """

    @classmethod
    def where(cls, mask: Tensor, *, values: Tensor | None = None) -> Restore:
        """The tokens that bool [batch, N] marks; `values` is [batch, N, width] here. Raises PluginError as `Keep`."""
        if values is None:
            return cls(index_of(_marks("Restore", mask)))
        index = true_positions(_marks("Restore", mask))
        return cls(index, values=values.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])))


@dataclass(frozen=True, eq=False)
class MergeGroup:
    """New tokens made from tokens of one batch row, for example those of one image; `Merge.from_groups` joins groups.

    Attributes:
        row: batch row.
        index: int64 [m], the tokens whose slots the new ones take, in any order.
        members: int64 [n], the tokens that the new ones are made of.
        weights: float [m, n], the share of each member's state that goes into each new token.
        origin: int64 [m], the token whose place in the image each new one has; −1 for none. Default: `index`.

    Examples:
        >>> import torch, tokenprune as tp
        >>> tokens, members = torch.tensor([5]), torch.tensor([5, 6])
        >>> tp.MergeGroup(row=0, index=tokens, members=members, weights=torch.tensor([[0.5, 0.5]])).weights
        tensor([[0.5000, 0.5000]])
    """

    row: int
    index: Tensor
    members: Tensor
    weights: Tensor
    origin: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises PluginError for shapes that do not match."""
        wanted = [len(self.index), len(self.members)]
        origin = self.index if self.origin is None else self.origin
        if list(self.weights.shape) != wanted or origin.shape != self.index.shape:
            raise PluginError(
                f"merge group of batch row {self.row}: weights of shape {list(self.weights.shape)} and origin of shape "
                f"{list(origin.shape)}; expected [len(index), len(members)] = {wanted} and [{wanted[0]}]"
            )


@dataclass(frozen=True)
class Merge(Decision):
    """These tokens stay active and carry weighted sums of others; every other active token is dropped.

    A row's k-th token becomes Σ_j weights[k, j] · state_j, or `values` if the sum was computed elsewhere (for example
    before the projector). The original tokens that each new token stands for are recorded as its lineage.

    With `rest="park"`, a token that contributes to none (all its weights are 0) and is not chosen is parked, with its
    state, mass and lineage; a token that contributes to another is dropped. A merge that conserves mass then conserves
    it over active and parked tokens together.

    Attributes:
        weights: float [batch, k, N], the share of token j's state that goes into token k.
        origin: int64 [batch, k], the token whose place in the image token k has; −1 for none. Default: itself.
        conserves_mass: whether the weights of every active token that is not parked sum to 1 over k (checked when
            True).
        rest: "drop" or "park".

    Examples:
        The first of three tokens stays, and becomes the mean of all of them:

        >>> import torch, tokenprune as tp
        >>> tp.Merge(torch.tensor([[0]]), weights=torch.full((1, 1, 3), 1 / 3)).index
        tensor([[0]])
    """

    weights: Tensor = field(kw_only=True)
    origin: Tensor | None = field(default=None, kw_only=True)
    conserves_mass: bool = field(default=False, kw_only=True)
    rest: str = field(default="drop", kw_only=True)

    @classmethod
    def from_groups(
        cls,
        tokens: Tokens,
        groups: Sequence[MergeGroup],
        *,
        scores: Tensor | None = None,
        conserves_mass: bool = False,
        rest: str = "drop",
    ) -> Merge:
        """The new tokens of all groups, each row's in the order of the slots that they take.

        Args:
            tokens: the tokens that the decision is about.
            groups: any number per batch row; a row without a group keeps no token.
            scores: see `Decision`.
            conserves_mass: see the class.
            rest: see the class.
        """
        batch, size = tokens.exists.shape
        ends = [0] * batch
        for group in groups:
            ends[group.row] += len(group.index)
        most = max(ends, default=0)
        index = torch.full((batch, most), -1, device=tokens.device)
        origin, weights = index.clone(), torch.zeros(batch, most, size, dtype=torch.float32, device=tokens.device)
        for group in reversed(groups):
            ends[group.row] -= len(group.index)
            new = slice(ends[group.row], ends[group.row] + len(group.index))
            index[group.row, new] = group.index
            origin[group.row, new] = group.index if group.origin is None else group.origin
            weights[group.row, new][:, group.members] = group.weights.float()
        # decisions list numbers in ascending order; the padding, −1, must stay at the end
        order = torch.where(index < 0, size, index).argsort(dim=1, stable=True)
        return cls(
            index.gather(1, order),
            weights=weights.gather(1, order[..., None].expand_as(weights)),
            origin=origin.gather(1, order),
            scores=scores,
            conserves_mass=conserves_mass,
            rest=rest,
        )


def top_mask(scores: Tensor, count: Tensor | int) -> Tensor:
    """bool [batch, N]: the `count` highest of float [batch, N] per row; ties go to the lower number.

    Raises:
        PluginError: scores or counts of another shape.
    """
    if scores.dim() != 2:
        raise PluginError(f"scores of shape {list(scores.shape)}; expected [batch, N]")
    counts = count.numel() if isinstance(count, Tensor) else 1
    if counts not in (1, len(scores)):
        raise PluginError(f"{counts} counts and scores of shape {list(scores.shape)}; expected one count, or [batch]")
    order = scores.argsort(dim=1, descending=True, stable=True)
    # one number for all rows stays on the host
    limit = count if isinstance(count, int) else torch.as_tensor(count, device=scores.device).reshape(-1, 1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    steps = torch.arange(scores.shape[1], device=scores.device)
    return chosen.scatter_(1, order, (steps < limit).expand_as(order))


def index_of(mask: Tensor) -> Tensor:
    """The argument `index` of a decision that is given as bool [batch, N]."""
    return true_positions(mask) if mask.device.type == "cpu" else cast(Tensor, _Marked(mask.clone()))


def _marks(kind: str, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise PluginError(
            f"{kind}.where was given {list(mask.shape)} {mask.dtype}; expected bool [batch, N] (token numbers go to "
            f"{kind} itself)"
        )
    return mask
