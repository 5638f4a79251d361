"""Attention of a layer before the layer runs, and handing its keys on to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.ledger import LookAhead
from tokenprune.core.scheduling.state import take_rows
from tokenprune.engine.calls import checkpointing
from tokenprune.engine.calls.interception import is_compiled_run, shadowed
from tokenprune.engine.calls.wrappers import uncompiled
from tokenprune.engine.decoder import Decoder
from tokenprune.engine.reads.attention_tap import AttentionCall, tap
from tokenprune.engine.sequence.gathered import GatheredSequence
from tokenprune.engine.sequence.temperature import lacking_scale, scaled_queries
from tokenprune.errors import UnsupportedError

INPUT_NORMS = ("input_layernorm", "operator_norm")


class KeysAhead:
    """Output of a layer's key projection, computed ahead, which the layer can use instead of computing it again.

    The projection works on each position alone, so that the rows of the kept tokens are the layer's own keys. They are
    used only if the layer passes the states that they were computed from, which it takes from here too: if the stage
    or a hook changed them, the layer computes both itself. Outside inference mode this is known without comparing
    their values, for which a device would have to be waited for.

    Args:
        norm: the layer's norm before attention.
        projection: the layer's key projection.
        states: [batch, M, width], its input: the norm's output.
        keys: [batch, M, width of keys], its output.
        frame: the shortened sequence of M positions; None = the full one.

    Attributes:
        used: positions per row whose keys the layer used.
    """

    def __init__(
        self, norm: nn.Module, projection: nn.Module, states: Tensor, keys: Tensor, frame: GatheredSequence | None
    ) -> None:
        self._norm, self._projection, self._frame = norm, projection, frame
        self._ready: tuple[Tensor, Tensor] | None = (states, keys)
        self._given: _Version | None = None
        self._normed: _Version | None = None
        self.used = 0

    def keep(self, frame: GatheredSequence | None) -> None:
        """Keep the positions of the frame that the layer runs on; none at all, if some of them were not computed."""
        before, self._frame = self._frame, frame
        if self._ready is None or before is frame:
            return
        if frame is None:
            self.forget()
            return
        index = frame.on_host.index
        places = index if before is None else before.on_host.places(index)
        if bool((places < 0).any()):
            self.forget()
        else:
            places = places.to(frame.index.device, non_blocking=True)
            states, keys = (take_rows(part, places) for part in self._ready)
            self._ready = states, keys

    def forget(self) -> None:
        """Release the tensors; the layer computes its keys itself."""
        self._ready = self._given = self._normed = None

    @contextmanager
    def handed_on(self, hidden: Tensor) -> Iterator[None]:
        """The layer uses the keys in its next call, on `hidden`, while the context is open."""
        self._given = _Version(hidden)
        try:
            with shadowed(self._norm, "forward", self._normalise), shadowed(self._projection, "forward", self._project):
                yield
        finally:
            self.forget()

    def _normalise(self, norm: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        given, self._given = self._given, None
        if self._ready is None or torch.is_grad_enabled() or given is None or not given.is_now(hidden):
            return norm(hidden)
        self._normed = _Version(self._ready[0])
        return self._ready[0]

    def _project(self, project: Callable[..., Tensor], states: Tensor) -> Tensor:
        # free the memory as soon as the layer has its keys
        ready, normed, self._ready, self._normed = self._ready, self._normed, None, None
        if ready is None:
            return project(states)
        # tensors of inference mode do not tell whether they were modified: only their values can be compared
        by_value = states.is_inference() and states.shape == ready[0].shape and states.dtype == ready[0].dtype
        if not (normed.is_now(states) if normed is not None else by_value and torch.equal(states, ready[0])):
            return project(states)
        self.used = states.shape[1]
        return ready[1]


class _Version:
    """A tensor as it was when this was made."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)

    def is_now(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, and was not modified since. Those of inference mode do not say."""
        return tensor is self._tensor and self._version is not None and self._version == _version(tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Ahead:
    """What was computed of a layer's attention before the layer runs.

    Attributes:
        seen: the queries and keys; queries of rows that were not asked for are undefined.
        cost: what was computed, for the ledger.
        keys: keys to hand on to the layer; None if that is not possible.
    """

    seen: AttentionCall
    cost: LookAhead
    keys: KeysAhead | None


def look_ahead(
    decoder: Decoder,
    layer: int,
    hidden: Tensor,
    kwargs: dict[str, Any],
    frame: GatheredSequence | None,
    rows: Tensor | None = None,
    values: bool = False,
) -> Ahead:
    """Queries and keys that a layer would compute from these states, with its own norm, projections and rotation.

    The layer itself runs, up to its attention: some norm the states before attention, and others only its output.
    Queries are projected only in the rows that are needed, values only if they are, and the output not at all, if
    their projections have the usual names.

    Args:
        decoder: the decoder.
        layer: the layer's number.
        hidden: [batch, M, width], states entering the layer.
        kwargs: the layer's keyword arguments for these states.
        frame: the shortened sequence of these states; None = the full one.
        rows: int64 [batch, R], the query rows that are needed, −1 for none; None = only keys are needed.
        values: whether values are needed too.

    Raises:
        UnsupportedError: the layer has no readable attention, or does not call it.
    """
    block, attention = decoder.layers[layer], decoder.attention(layer)
    found: list[AttentionCall] = []
    keys: list[tuple[Tensor, Tensor]] = []
    normed: list[tuple[Tensor, Tensor]] = []
    placed = (weight.device for weight in attention.parameters() if weight.device.type != "meta")  # meta: offloaded
    device = next(placed, hidden.device)
    wanted = {name: None if name == "past_key_values" else _moved(value, device) for name, value in kwargs.items()}
    rows = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device) if rows is None else rows.clamp(min=0)
    some: Callable[..., Tensor] = partial(_some_rows, rows)
    instead = (
        {"q_proj": some, "o_proj": _no_rows} if values else {"q_proj": some, "v_proj": _no_rows, "o_proj": _no_rows}
    )
    norm: Any = next((getattr(block, name) for name in INPUT_NORMS if hasattr(block, name)), None)
    hand_on = norm is not None and _can_hand_on(block, attention, norm)
    if hand_on:
        instead["k_proj"] = partial(_remember, keys)
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(tap({attention: found.append}, instead=_nothing))
        undo.enter_context(shadowed(attention, "forward", _and_no_further))
        if hand_on:
            undo.enter_context(shadowed(norm, "forward", partial(_remember, normed)))
        for name, wrapper in instead.items():
            projection = getattr(attention, name, None)
            if projection is not None:
                undo.enter_context(shadowed(uncompiled(projection), "forward", wrapper))
        undo.enter_context(scaled_queries(attention, lacking_scale(attention, frame)))
        undo.enter_context(shadowed(block, checkpointing.FUNCTION, _without_checkpoint))
        with suppress(_AttentionReached):
            type(block).forward(block, hidden.to(device), **wanted)
    if not found:
        raise UnsupportedError(f"{type(block).__name__} does not call its attention, which cannot be computed ahead")
    ready = None
    if keys and normed and keys[0][0] is normed[0][1]:  # not of a layer that norms the output of attention
        ready = KeysAhead(norm, getattr(attention, "k_proj"), *keys[0], frame)  # noqa: B009
    return Ahead(found[0], _cost(attention, hidden.shape[1], rows.shape[1], values), ready)


class _AttentionReached(Exception):
    """Ends a layer's run after its attention."""


def _without_checkpoint(checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of the checkpoint that a layer in training hands itself to."""
    return run(*args)


def _and_no_further(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    attention(*args, **kwargs)
    raise _AttentionReached


def _cost(attention: nn.Module, length: int, rows: int, values: bool) -> LookAhead:
    fused = not hasattr(attention, "k_proj")  # one projection of queries, keys and values, or another kind
    some = getattr(attention, "q_proj", None) is not None  # None where queries are made of latents (DeepSeek-V3)
    return LookAhead(length, rows if some else length, length if fused or values else 0, rows)


def _can_hand_on(block: nn.Module, attention: nn.Module, norm: nn.Module) -> bool:
    """True if the layer's key projection is plain, and nothing else needs it or the norm to run: gradients, hooks, a
    compiler."""
    keys: Any = getattr(attention, "k_proj", None)
    if torch.is_grad_enabled() or is_compiled_run() or type(keys) is not nn.Linear:
        return False
    if "forward" in keys.__dict__ or "forward" in norm.__dict__ or uncompiled(norm) is not norm:
        return False
    if all(child is not attention for child in block.children()):  # compiled alone
        return False
    compiled = any(part._compiled_call_impl is not None for part in (block, attention, norm, keys))
    return not (compiled or keys._forward_hooks or keys._forward_pre_hooks)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _some_rows(rows: Tensor, project: Callable[..., Tensor], states: Tensor, *args: Any) -> Tensor:
    """Replaces the query projection: run it on the rows that are needed, each put in its place among zeros.

    At full length the rows pass the layer's own norm and rotation as they do in the layer.
    """
    some = project(take_rows(states, rows), *args)
    queries = some.new_zeros(*states.shape[:2], some.shape[-1])
    index = rows.to(some.device)[..., None].expand_as(some)
    return queries.scatter_(1, index, some)


def _remember(found: list[tuple[Tensor, Tensor]], forward: Callable[..., Tensor], states: Tensor) -> Tensor:
    output = forward(states)
    found.append((states, output))
    return output


def _no_rows(project: Callable[..., Tensor], states: Tensor, *args: Any) -> Tensor:
    """Replaces a projection whose output is not needed: run it on no rows, and give zeros of the output's shape."""
    none = project(states[:, :0], *args)
    return none.new_zeros(()).expand(*states.shape[:2], none.shape[-1])


def _nothing(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Replaces an attention function whose output is not needed."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
