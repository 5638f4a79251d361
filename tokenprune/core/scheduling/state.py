"""The state of every image token during a prefill, and how a decision changes it. Tensors only, no model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision, Keep, Merge, Restore


@dataclass(frozen=True)
class TokenState:
    """The state of every original image token.

    Attributes:
        exists: bool [batch, N], False on the padding of rows with fewer than N tokens.
        active: bool [batch, N], takes part in the current layer.
        parked: bool [batch, N], can be restored.
        mass: float32 [batch, N], original tokens that an active or parked token stands for; 0 once dropped or merged
            away.
        origin: int64 [batch, N], the original token whose place in the image the token has; −1 for none.
        lineage: bool [batch, N, N], [b, k, j] = original token j contributes to token k; None = each token is
            only itself.
    """

    exists: Tensor
    active: Tensor
    parked: Tensor
    mass: Tensor
    origin: Tensor
    lineage: Tensor | None = None

    @classmethod
    def start(cls, exists: Tensor) -> TokenState:
        """Every existing token active, with mass 1 and no lineage."""
        numbers = torch.arange(exists.shape[1], device=exists.device).expand_as(exists)
        return cls(exists, exists.clone(), torch.zeros_like(exists), exists.float(), torch.where(exists, numbers, -1))

    @property
    def alive(self) -> Tensor:
        """bool [batch, N]: active or parked."""
        return self.active | self.parked

    @property
    def dropped(self) -> Tensor:
        """bool [batch, N]: gone for good."""
        return self.exists & ~self.alive

    def stands_for(self) -> Tensor:
        """bool [batch, N, N]: the lineage of the tokens that are still alive."""
        identity = torch.eye(self.exists.shape[1], dtype=torch.bool, device=self.exists.device).expand(
            len(self.exists), -1, -1
        )
        lineage = identity if self.lineage is None else self.lineage
        return lineage & self.alive[:, :, None]

    def only(self, rows: Tensor, size: int) -> TokenState:
        """The state that a strategy sees when it chooses for some of the rows: the others have no tokens.

        Args:
            rows: bool [batch], in the host's memory.
            size: the largest number of tokens in one of these rows.
        """
        here = rows.to(self.exists.device, non_blocking=True)[:, None]

        def cut(values: Tensor, missing: int = 0) -> Tensor:
            return torch.where(here, values[:, :size], missing)

        exists, active, parked = (cut(values, False) for values in (self.exists, self.active, self.parked))
        lineage = None if self.lineage is None else self.lineage[:, :size, :size] & here[..., None]
        return TokenState(exists, active, parked, cut(self.mass), cut(self.origin, -1), lineage)

    def replaced(self, rows: Tensor, part: TokenState) -> TokenState:
        """This state with `rows` taken from `part`; see `only`."""
        size, here = part.exists.shape[1], rows.to(self.exists.device, non_blocking=True)[:, None]

        def joined(values: Tensor, new: Tensor) -> Tensor:
            return torch.cat((torch.where(here, new, values[:, :size]), values[:, size:]), 1)

        names = ("exists", "active", "parked", "mass", "origin")
        fields = {name: joined(getattr(self, name), getattr(part, name)) for name in names}
        lineage = self.lineage
        if lineage is not None or part.lineage is not None:
            lineage = self.stands_for() if lineage is None else lineage.clone()
            own = torch.zeros_like(lineage)
            own[:, :size, :size] = part.stands_for()
            lineage = torch.where(here[..., None], own, lineage)
        return TokenState(**fields, lineage=lineage)

    def after(self, decision: Decision) -> TokenState:
        """The state after a (validated) decision."""
        chosen = chosen_tokens(decision, self.exists)
        if isinstance(decision, Restore):
            return replace(self, active=self.active | chosen, parked=self.parked & ~chosen)
        if isinstance(decision, Merge):
            return self._merged(decision, chosen)
        assert isinstance(decision, Keep)
        gone = self.active & ~chosen
        if decision.rest == "park":
            return replace(self, active=chosen, parked=self.parked | gone)
        return replace(self, active=chosen, mass=self.mass.masked_fill(gone, 0.0))

    def _merged(self, decision: Merge, chosen: Tensor) -> TokenState:
        size = self.exists.shape[1]
        weights = spread_rows(decision.weights.float(), decision.index, size)
        carried = self.stands_for()
        lineage = weights != 0
        if self.lineage is not None:
            lineage = torch.einsum("bkj,bji->bki", lineage.float(), carried.float()) > 0
        mass = (weights * self.mass[:, None]).sum(2)
        parked = self.parked
        if decision.rest == "park":
            parked = parked | (self.active & ~chosen & ~(weights != 0).any(1))  # tokens that contribute to no other
        kept_parked = parked[:, :, None] & carried
        origin = torch.where(decision.index >= 0, decision.index, -1) if decision.origin is None else decision.origin
        # a token that moves to another slot keeps its place in the image
        origin = torch.where(origin >= 0, self.origin.gather(1, origin.clamp(min=0)), -1)
        placed = torch.full_like(self.origin, -1)
        placed = spread_rows(origin[..., None], decision.index, size, base=placed[..., None]).squeeze(-1)
        return replace(
            self,
            active=chosen,
            parked=parked,
            mass=torch.where(parked, self.mass, torch.where(chosen, mass, 0.0)),
            origin=torch.where(chosen, placed, self.origin),
            lineage=(lineage & chosen[:, :, None]) | kept_parked,
        )


def chosen_tokens(decision: Decision, exists: Tensor) -> Tensor:
    """bool [batch, N] like `exists`: the tokens that a decision names; numbers out of range count as the nearest."""
    mask, size = given_mask(decision, exists), exists.shape[1]
    return as_mask(decision.index.clamp(-1, size - 1), size) if mask is None else mask


def given_mask(decision: Decision, exists: Tensor) -> Tensor | None:
    """bool [batch, N]: the mask that a decision was given as, if it is one of these tokens."""
    mask = decision.mask
    return mask if mask is not None and mask.shape == exists.shape and mask.device == exists.device else None


def in_range(decision: Decision, size: int) -> Decision:
    """A decision whose numbers out of range are replaced by the nearest in range.

    A device that is given others fails for good, even if the decision is refused afterwards.
    """
    if not isinstance(decision, Merge):
        return decision
    origin = None if decision.origin is None else decision.origin.clamp(-1, size - 1)
    return replace(decision, index=decision.index.clamp(-1, size - 1), origin=origin)


def as_mask(index: Tensor, size: int) -> Tensor:
    """bool [batch, size] that is True at int64 [batch, k] (−1 ignored)."""
    mask = torch.zeros(len(index), size + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, torch.where(index < 0, size, index), True)[:, :size]


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Values [batch, size, …] at rows int64 `index` [batch, k], none of them negative: [batch, k, …].

    Copies whole rows, which is several times faster than `torch.gather` by single elements.
    """
    index = index.to(values.device)
    starts = torch.arange(len(index), device=index.device)[:, None] * values.shape[1]
    taken = values.flatten(0, 1).index_select(0, (starts + index).flatten())
    return taken.reshape(*index.shape, *values.shape[2:])


def spread_rows(values: Tensor, index: Tensor, size: int, base: Tensor | None = None) -> Tensor:
    """Put values [batch, k, …] at rows `index` [batch, k] of a [batch, size, …] tensor of zeros (or of `base`); −1
    is ignored.

    Gradients flow from the result to `values` and `base`.
    """
    if base is None:
        base = values.new_zeros(len(index), size, *values.shape[2:])
    padded = torch.cat((base, base[:, :1]), 1)  # the spare row is where −1 points to
    where = torch.where(index < 0, size, index)
    where = where.reshape(*index.shape, *([1] * (values.dim() - 2))).expand(values.shape)
    return padded.scatter(1, where, values)[:, :size]
