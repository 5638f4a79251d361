"""Is what a strategy answered something that can be carried out? Every refusal names the strategy and the stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tokenprune.decisions import Decision, Keep, Merge, Restore
from tokenprune.errors import PluginError
from tokenprune.state import TokenState, as_mask

_Refuse: TypeAlias = Callable[[str, str], PluginError]


def check_decision(decision: object, state: TokenState, *, who: str, stage: str, width: int | None = None) -> Decision:
    """Return the decision if it is sound.

    Args:
        decision: whatever `choose` returned.
        state: the tokens on entering the stage.
        who: strategy name, for messages.
        stage: stage name, for messages.
        width: hidden size that `values` must have; None = not checked.

    Raises:
        PluginError: names strategy, stage, what was found and what was expected.
    """
    refuse = partial(_refusal, who, stage)
    if not isinstance(decision, (Keep, Restore, Merge)):
        raise refuse(f"choose() returned {type(decision).__name__}", "a Keep, Restore or Merge decision")
    _check_index(decision.index, state.exists, refuse)
    if isinstance(decision, Keep) and decision.rest not in ("drop", "park"):
        raise refuse(f"Keep(rest={decision.rest!r})", "rest='drop' or rest='park'")
    pool, what = (state.parked, "parked") if isinstance(decision, Restore) else (state.active, "active")
    chosen = as_mask(decision.index, state.exists.shape[1])
    if (chosen & ~pool).any():
        row, token = (chosen & ~pool).nonzero()[0].tolist()
        raise refuse(f"image token {token} of batch row {row} chosen, which is not {what}", f"{what} tokens only")
    _check_floats(decision, state, width, refuse)
    if isinstance(decision, Merge):
        _check_merge(decision, state, refuse)
    return decision


def check_target(state: TokenState, target: Tensor, *, who: str, stage: str) -> None:
    """Hold the state after a decision to the declared number of tokens.

    Args:
        state: the tokens once the decision is taken.
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


def _check_index(index: Tensor, exists: Tensor, refuse: _Refuse) -> None:
    batch, size = exists.shape
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 2 or len(index) != batch:
        found = f"{list(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise refuse(f"index is {found}", f"int64 [batch = {batch}, k]")
    if index.device != exists.device:
        raise refuse(f"index is on {index.device}", f"{exists.device}, where the tokens are (tokens.device)")
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
    both = after >= 0
    if (both & (after == before)).any() or _repeats(index):
        raise refuse("a token number twice in one row", "every token once")
    if (both & (after < before)).any():
        raise refuse("unsorted token numbers", "ascending order (use torch.sort)")


def _repeats(index: Tensor) -> bool:
    ordered = index.sort(1).values
    return bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())


def _check_floats(decision: Decision, state: TokenState, width: int | None, refuse: _Refuse) -> None:
    if decision.scores is not None:
        if decision.scores.shape != state.exists.shape:
            raise refuse(f"scores of shape {list(decision.scores.shape)}", f"[batch, N] = {list(state.exists.shape)}")
        if torch.isnan(decision.scores).any():
            raise refuse("NaN among the scores", "numbers; −inf means never")
    values = decision.values
    if values is not None:
        wanted = [*decision.index.shape, width if width is not None else values.shape[-1]]
        if list(values.shape) != wanted:
            raise refuse(f"values of shape {list(values.shape)}", f"[batch, k, width] = {wanted}")
        if not values.is_floating_point() or values.device != state.exists.device:
            raise refuse(f"values are {values.dtype} on {values.device}", f"floating point on {state.exists.device}")
        if not torch.isfinite(values[decision.index >= 0]).all():
            raise refuse("NaN or infinity among the values", "finite states")


def _check_merge(decision: Merge, state: TokenState, refuse: _Refuse) -> None:
    wanted = [*decision.index.shape, state.exists.shape[1]]
    if list(decision.weights.shape) != wanted:
        raise refuse(f"weights of shape {list(decision.weights.shape)}", f"[batch, k, N] = {wanted}")
    if decision.origin is not None and decision.origin.shape != decision.index.shape:
        raise refuse(f"origin of shape {list(decision.origin.shape)}", f"{list(decision.index.shape)} like index")
    real = decision.weights.masked_fill((decision.index < 0)[..., None], 0)
    if (real.ne(0) & ~state.active[:, None, :]).any() or not torch.isfinite(real).all():
        raise refuse("weights on tokens that are not active, or not finite", "finite weights on active tokens")
    if decision.conserves_mass:
        given = (real.sum(1) - 1).abs().masked_fill(~state.active, 0)
        if (given > 1e-4).any():
            raise refuse(
                "a merge that says it conserves mass but does not",
                "weights that sum to 1 over k for every active token",
            )
