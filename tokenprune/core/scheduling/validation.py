"""Checks that a strategy's decision can be carried out. Every error names the strategy and the stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.scheduling.state import TokenState, chosen_tokens, given_mask
from tokenprune.errors import PluginError, TokenPruneError
from tokenprune.plugins.attribution import blamed
from tokenprune.utils.host_copies import on_host

_Refuse: TypeAlias = Callable[[str, str], PluginError]


class ValueChecks:
    """What is wrong with a decision if certain values are True. All are read together: the host waits for each read."""

    def __init__(self) -> None:
        self._wrong: list[Tensor] = []
        self._errors: list[Callable[[], TokenPruneError]] = []

    def add(self, wrong: Tensor, error: Callable[[], TokenPruneError]) -> None:
        """Add a check: `error` makes the error if any entry of bool `wrong` is True."""
        self._wrong.append(wrong.any())
        self._errors.append(error)

    def found(self) -> Tensor:
        """bool [checks]: which failed, on the decision's device."""
        return torch.stack(self._wrong) if self._wrong else torch.zeros(0, dtype=torch.bool)

    def verify(self, found: Tensor | None = None) -> None:
        """Raise the first error, given `found` in the host's memory, if it was read already."""
        (found,) = on_host(self.found()) if found is None else (found,)
        for failed, error in zip(found.tolist(), self._errors, strict=True):
            if failed:
                raise error()


def check_decision(
    decision: object,
    state: TokenState,
    *,
    who: str,
    stage: str,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> Decision:
    """The decision, if it is valid; arguments and errors as for `decision_checks`."""
    checks = ValueChecks()
    checked = decision_checks(decision, state, checks, who, stage, width=width, dtype=dtype)
    checks.verify()
    return checked


def decision_checks(
    decision: object,
    state: TokenState,
    checks: ValueChecks,
    who: str,
    stage: str,
    *,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> Decision:
    """The decision, if its kind and the shapes of its tensors are valid.

    Args:
        decision: what `choose` returned.
        state: the tokens on entering the stage.
        checks: to which those of the tensors' values are added.
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
        _check_index(decision, state.exists, refuse, checks)
        if isinstance(decision, (Keep, Merge)) and decision.rest not in ("drop", "park"):
            raise refuse(f"{type(decision).__name__}(rest={decision.rest!r})", "rest='drop' or rest='park'")
        pool, what = (state.parked, "parked") if isinstance(decision, Restore) else (state.active, "active")
        outside = chosen_tokens(decision, state.exists) & ~pool

        def absent() -> PluginError:
            row, token = _first(outside)
            return refuse(f"image token {token} of batch row {row} chosen, which is not {what}", f"{what} tokens only")

        checks.add(outside, absent)
        _check_floats(decision, state, width, dtype, refuse, checks)
        if isinstance(decision, Merge):
            _check_merge(decision, state, dtype, refuse, checks)
    return decision


def check_target(active: Sequence[int], target: Sequence[int], *, who: str, stage: str) -> None:
    """Check the state after a decision against the declared number of tokens.

    Args:
        active: active tokens of each batch row after the decision.
        target: those declared, −1 where none was declared.
        who: strategy name, for messages.
        stage: stage name, for messages.

    Raises:
        PluginError: another number of active tokens.
    """
    for row, (found, expected) in enumerate(zip(active, target, strict=True)):
        if expected not in (-1, found):
            raise _refusal(
                who,
                stage,
                f"{found} active tokens in batch row {row} after the choice",
                f"the {expected} that the stage declared",
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


def _check_index(decision: Decision, exists: Tensor, refuse: _Refuse, checks: ValueChecks) -> None:
    batch, size = exists.shape
    if given_mask(decision, exists) is not None:
        return  # its numbers are in range, in order and different
    index = decision.index
    _check_tensor("index", index, exists.device, refuse)
    if index.dtype != torch.int64 or index.dim() != 2 or len(index) != batch:
        raise refuse(f"index is {list(index.shape)} {index.dtype}", f"int64 [batch = {batch}, k]")
    before, after = index[:, :-1], index[:, 1:]

    def out_of_range() -> PluginError:
        low, high = int(index.min()), int(index.max())
        return refuse(
            f"index out of range: {low if low < -1 else high}", f"image-token numbers 0 … {size - 1}, −1 as padding"
        )

    def out_of_order() -> PluginError:
        if bool(((before < 0) & (after >= 0)).any()):
            return refuse("−1 before a token number", "the padding −1 at the end of a row")
        ordered = index.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(twice.any()):
            row, place = _first(twice)
            return refuse(f"image token {int(ordered[row, place])} twice in batch row {row}", "every token once")
        row, place = _first((after >= 0) & (after < before))
        found = f"unsorted token numbers, {int(before[row, place])} before {int(after[row, place])} in batch row {row}"
        return refuse(found, "ascending order (use torch.sort, Keep.top or Keep.where)")

    checks.add((index < -1) | (index >= size), out_of_range)
    checks.add((after >= 0) & ((before < 0) | (after <= before)), out_of_order)


def _first(wrong: Tensor) -> list[int]:
    """The first place where a mask holds."""
    place: list[int] = wrong.nonzero()[0].tolist()
    return place


def _check_floats(
    decision: Decision,
    state: TokenState,
    width: int | None,
    dtype: torch.dtype | None,
    refuse: _Refuse,
    checks: ValueChecks,
) -> None:
    device, scores, values = state.exists.device, decision.scores, decision.values
    if scores is not None:
        _check_tensor("scores", scores, device, refuse)
        if scores.shape != state.exists.shape:
            raise refuse(f"scores of shape {list(scores.shape)}", f"[batch, N] = {list(state.exists.shape)}")
        if scores.is_complex():
            raise refuse(f"scores are {scores.dtype}", "real numbers")
        missing = torch.isnan(scores)

        def not_a_number() -> PluginError:
            row, token = _first(missing)
            found = f"NaN among the scores, at image token {token} of batch row {row}"
            return refuse(found, "numbers; −inf means never")

        checks.add(missing, not_a_number)
    if values is not None:
        _check_tensor("values", values, device, refuse)
        wanted = [*decision.index.shape, width if width is not None else values.shape[-1]]
        if list(values.shape) != wanted:
            raise refuse(f"values of shape {list(values.shape)}", f"[batch, k, width] = {wanted}")
        if not values.is_floating_point():
            raise refuse(f"values are {values.dtype}", "floating point")
        expected = f"states that are finite{_in(dtype)}"
        wrong = ~_finite(values, dtype).all(-1) & (decision.index >= 0)
        checks.add(wrong, lambda: refuse("NaN or infinity among the values", expected))


def _check_merge(
    decision: Merge, state: TokenState, dtype: torch.dtype | None, refuse: _Refuse, checks: ValueChecks
) -> None:
    weights, device, size = decision.weights, state.exists.device, state.exists.shape[1]
    _check_tensor("weights", weights, device, refuse)
    wanted = [*decision.index.shape, size]
    if list(weights.shape) != wanted:
        raise refuse(f"weights of shape {list(weights.shape)}", f"[batch, k, N] = {wanted}")
    if not weights.is_floating_point():
        raise refuse(f"weights are {weights.dtype}", "floating point")
    if decision.origin is not None:
        _check_origin(decision.origin, decision.index, size, refuse, checks)
    real = weights.masked_fill((decision.index < 0)[..., None], 0)
    inactive = real.ne(0) & ~state.active[:, None, :]

    def not_active() -> PluginError:
        row, _, token = _first(inactive)
        return refuse(f"a weight on image token {token} of batch row {row}, which is not active", "weights of 0 there")

    checks.add(inactive, not_active)
    expected = f"numbers that are finite{_in(dtype)}"
    checks.add(~_finite(real, dtype), lambda: refuse("NaN or infinity among the weights", expected))
    if not decision.conserves_mass:
        return
    given, counted = real.sum(1), state.active
    if decision.rest == "park":
        counted = counted & (chosen_tokens(decision, state.exists) | real.ne(0).any(1))
    wrong = ((given - 1).abs() > 1e-4) & counted

    def not_conserved() -> PluginError:
        row, token = _first(wrong)
        share = f"image token {token} of batch row {row} goes {float(given[row, token]):.3f} times into those kept"
        sums = "weights that sum to 1 over k for every active token"
        return refuse(f"a merge that says it conserves mass but does not: {share}", sums)

    checks.add(wrong, not_conserved)


def _check_origin(origin: Tensor, index: Tensor, size: int, refuse: _Refuse, checks: ValueChecks) -> None:
    _check_tensor("origin", origin, index.device, refuse)
    if origin.shape != index.shape or origin.dtype != torch.int64:
        raise refuse(f"origin is {list(origin.shape)} {origin.dtype}", f"int64 {list(index.shape)} like index")
    outside = (origin < -1) | (origin >= size)
    expected = f"image-token numbers 0 … {size - 1}, −1 for no place"
    checks.add(outside, lambda: refuse(f"origin out of range: {int(origin[outside][0])}", expected))


def _finite(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.isfinite(values if dtype is None else values.to(dtype))


def _in(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}, the model's type"
