"""Checks that a strategy's decision can be carried out. Every error names the strategy and the stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.scheduling.state import TokenState, as_mask
from tokenprune.errors import PluginError
from tokenprune.plugins.attribution import blamed

_Refuse: TypeAlias = Callable[[str, str], PluginError]


def check_decision(
    decision: object,
    state: TokenState,
    *,
    who: str,
    stage: str,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> Decision:
    """The decision, if it is valid.

    Args:
        decision: what `choose` returned.
        state: the tokens on entering the stage.
        who: strategy name, for messages.
        stage: stage name, for messages.
        width: hidden size that `values` must have; None = not checked.
        dtype: in which `values` and `weights` must be finite; None = their own dtype.

    Raises:
        PluginError: the decision is not valid; names strategy, stage, what was found and what was expected.
    """
    refuse = partial(_refusal, who, stage)
    if not isinstance(decision, (Keep, Restore, Merge)):
        raise refuse(f"choose() returned {type(decision).__name__}", "a Keep, Restore or Merge decision")
    with blamed(lambda found: refuse(f"the check of the decision's tensors failed with {found}", "ordinary tensors")):
        _check_index(decision.index, state.exists, refuse)
        if isinstance(decision, (Keep, Merge)) and decision.rest not in ("drop", "park"):
            raise refuse(f"{type(decision).__name__}(rest={decision.rest!r})", "rest='drop' or rest='park'")
        pool, what = (state.parked, "parked") if isinstance(decision, Restore) else (state.active, "active")
        chosen = as_mask(decision.index, state.exists.shape[1])
        if (chosen & ~pool).any():
            row, token = (chosen & ~pool).nonzero()[0].tolist()
            raise refuse(f"image token {token} of batch row {row} chosen, which is not {what}", f"{what} tokens only")
        _check_floats(decision, state, width, dtype, refuse)
        if isinstance(decision, Merge):
            _check_merge(decision, state, dtype, refuse)
    return decision


def check_target(state: TokenState, target: Tensor, *, who: str, stage: str) -> None:
    """Check the state after a decision against the declared number of tokens.

    Args:
        state: the tokens after the decision.
        target: int64 [batch], declared active tokens, −1 where none was declared.
        who: strategy name, for messages.
        stage: stage name, for messages.

    Raises:
        PluginError: another number of active tokens.
    """
    active = state.active.sum(1)
    wrong = ((target >= 0) & (active != target)).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise _refusal(
            who,
            stage,
            f"{int(active[row])} active tokens in batch row {row} after the choice",
            f"the {int(target[row])} that the stage declared",
        )


def _refusal(who: str, stage: str, found: str, expected: str) -> PluginError:
    return PluginError(f"strategy {who!r}, stage {stage!r}: {found}; expected {expected}")


def _check_tensor(name: str, value: object, device: torch.device, refuse: _Refuse) -> None:
    if not isinstance(value, Tensor):
        raise refuse(f"{name} is {type(value).__name__}", "a tensor")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise refuse(f"{name} is a {kind} tensor", "a dense one (use to_dense())")
    if value.device != device:
        raise refuse(f"{name} is on {value.device}", f"{device}, where the tokens are (tokens.device)")


def _check_index(index: Tensor, exists: Tensor, refuse: _Refuse) -> None:
    batch, size = exists.shape
    _check_tensor("index", index, exists.device, refuse)
    if index.dtype != torch.int64 or index.dim() != 2 or len(index) != batch:
        raise refuse(f"index is {list(index.shape)} {index.dtype}", f"int64 [batch = {batch}, k]")
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < -1 or high >= size:
        raise refuse(
            f"index out of range: {low if low < -1 else high}", f"image-token numbers 0 … {size - 1}, −1 as padding"
        )
    before, after = index[:, :-1], index[:, 1:]
    if ((before < 0) & (after >= 0)).any():
        raise refuse("−1 before a token number", "the padding −1 at the end of a row")
    ordered = index.sort(1).values
    if found := _first((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
        row, place = found
        raise refuse(f"image token {int(ordered[row, place])} twice in batch row {row}", "every token once")
    if found := _first((after >= 0) & (after < before)):
        row, place = found
        found_order = (
            f"unsorted token numbers, {int(before[row, place])} before {int(after[row, place])} in batch row {row}"
        )
        raise refuse(found_order, "ascending order (use torch.sort, Keep.top or Keep.where)")


def _first(wrong: Tensor) -> list[int] | None:
    """The first place where a mask holds, or None."""
    places: list[list[int]] = wrong.nonzero()[:1].tolist()
    return places[0] if places else None


def _check_floats(
    decision: Decision, state: TokenState, width: int | None, dtype: torch.dtype | None, refuse: _Refuse
) -> None:
    device = state.exists.device
    if decision.scores is not None:
        _check_tensor("scores", decision.scores, device, refuse)
        if decision.scores.shape != state.exists.shape:
            raise refuse(f"scores of shape {list(decision.scores.shape)}", f"[batch, N] = {list(state.exists.shape)}")
        if decision.scores.is_complex():
            raise refuse(f"scores are {decision.scores.dtype}", "real numbers")
        if found := _first(torch.isnan(decision.scores)):
            row, token = found
            found_nan = f"NaN among the scores, at image token {token} of batch row {row}"
            raise refuse(found_nan, "numbers; −inf means never")
    values = decision.values
    if values is not None:
        _check_tensor("values", values, device, refuse)
        wanted = [*decision.index.shape, width if width is not None else values.shape[-1]]
        if list(values.shape) != wanted:
            raise refuse(f"values of shape {list(values.shape)}", f"[batch, k, width] = {wanted}")
        if not values.is_floating_point():
            raise refuse(f"values are {values.dtype}", "floating point")
        if not _finite(values[decision.index >= 0], dtype):
            raise refuse("NaN or infinity among the values", f"states that are finite{_in(dtype)}")


def _check_merge(decision: Merge, state: TokenState, dtype: torch.dtype | None, refuse: _Refuse) -> None:
    weights, device, size = decision.weights, state.exists.device, state.exists.shape[1]
    _check_tensor("weights", weights, device, refuse)
    wanted = [*decision.index.shape, size]
    if list(weights.shape) != wanted:
        raise refuse(f"weights of shape {list(weights.shape)}", f"[batch, k, N] = {wanted}")
    if not weights.is_floating_point():
        raise refuse(f"weights are {weights.dtype}", "floating point")
    if decision.origin is not None:
        _check_origin(decision.origin, decision.index, size, refuse)
    real = weights.masked_fill((decision.index < 0)[..., None], 0)
    if found := _first(real.ne(0) & ~state.active[:, None, :]):
        row, _, token = found
        raise refuse(f"a weight on image token {token} of batch row {row}, which is not active", "weights of 0 there")
    if not _finite(real, dtype):
        raise refuse("NaN or infinity among the weights", f"numbers that are finite{_in(dtype)}")
    if decision.conserves_mass:
        given, counted = real.sum(1), state.active
        if decision.rest == "park":
            counted = counted & (as_mask(decision.index, size) | real.ne(0).any(1))
        if found := _first(((given - 1).abs() > 1e-4) & counted):
            row, token = found
            share = f"image token {token} of batch row {row} goes {float(given[row, token]):.3f} times into those kept"
            expected = "weights that sum to 1 over k for every active token"
            raise refuse(f"a merge that says it conserves mass but does not: {share}", expected)


def _check_origin(origin: Tensor, index: Tensor, size: int, refuse: _Refuse) -> None:
    _check_tensor("origin", origin, index.device, refuse)
    if origin.shape != index.shape or origin.dtype != torch.int64:
        raise refuse(f"origin is {list(origin.shape)} {origin.dtype}", f"int64 {list(index.shape)} like index")
    outside = (origin < -1) | (origin >= size)
    if outside.any():
        found = int(origin[outside][0])
        raise refuse(f"origin out of range: {found}", f"image-token numbers 0 … {size - 1}, −1 for no place")


def _finite(values: Tensor, dtype: torch.dtype | None) -> bool:
    return bool(torch.isfinite(values if dtype is None else values.to(dtype)).all())


def _in(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}, the model's type"
