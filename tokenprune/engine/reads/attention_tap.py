"""The attention tap: reads queries, keys and single attention rows of any attention layer, without eager attention.

A tapped module gets a private copy of its config that names an attention function registered with
`transformers.AttentionInterface`. That function computes the output with the module's own implementation, then passes
queries and keys to a callback. The model still creates masks from its own config. A tap applies only to calls of the
thread that installed it; other threads may install their own.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenprune.engine.calls.interception import REASON
from tokenprune.errors import UnsupportedError

_NAME = "tokenprune_tap"
_TAP = "_tokenprune_tap"


@dataclass(frozen=True)
class AttentionCall:
    """Queries, keys and values of one call of an attention layer.

    Attributes:
        query: [batch, heads, Q, head size], after rotary embedding.
        key: [batch, key heads, K, head size], after rotary embedding, cached keys included.
        value: [batch, key heads, K, head size].
        mask: the mask passed to the layer's implementation, or None.
        scaling: factor on query · key.
        causal: whether the attention is causal without a mask.
        softcap: tanh cap on the logits, or None.
        earlier: how many of the keys, the first ones, are of earlier calls, in a later turn of a conversation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool
    softcap: float | None = None
    earlier: int = 0

    def of_prompt(self) -> AttentionCall:
        """The same of a prefill without the empty slots of a static cache, which follow the prompt's keys."""
        length = self.earlier + self.query.shape[2]
        return replace(self, key=self.key[:, :, :length], value=self.value[:, :, :length])

    def of_turn(self) -> AttentionCall:
        """The same without the keys of earlier calls."""
        mask = None if self.mask is None else self.mask[..., self.earlier :]
        return replace(
            self, key=self.key[:, :, self.earlier :], value=self.value[:, :, self.earlier :], mask=mask, earlier=0
        )

    def after(self, keys: Tensor, values: Tensor) -> AttentionCall:
        """The same behind keys and values of earlier calls, which the mask includes already."""
        key, value = (torch.cat((past, own), 2) for past, own in ((keys, self.key), (values, self.value)))
        return replace(self, key=key, value=value, earlier=keys.shape[2])

    def attention(self, rows: Tensor, among: Tensor | None = None) -> Tensor:
        """Attention weights of single query rows: float32 [batch, heads, R, K], a softmax over all visible keys.

        Args:
            rows: int64 [batch, R], positions on the query axis; rows for negative ones are undefined.
            among: bool [batch, K], the only keys that the softmax is over, 0 elsewhere; None = all that are visible.
                Rows that see none of them, as behind a sliding window, are 0.
        """
        query, key = self.query, self.key
        batch, heads, length, size = query.shape
        groups, keys = key.shape[1], key.shape[2]
        rows = rows.to(query.device).clamp(min=0)
        picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))
        # grouped heads share a key head: compute per group instead of repeating the keys
        picked = picked.float().reshape(batch, groups, -1, size)
        logits = (picked @ key.float().transpose(2, 3)).reshape(batch, heads, rows.shape[1], keys) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = self._masked(logits, rows, length)
        if among is None:
            return logits.softmax(-1)
        among = among[:, None, None].to(logits.device)
        blind = ~(self.visible(rows) & among).any(-1, keepdim=True)
        return logits.masked_fill(~among, float("-inf")).softmax(-1).masked_fill(blind, 0)

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys single query rows, int64 [batch, R] as above, see: bool [batch, 1 or heads, R, K]."""
        mask, seen = self.mask, self
        if mask is not None and mask.dim() > 2 and mask.is_floating_point():
            # an additive mask hides by the smallest finite number of its type
            seen = replace(self, mask=mask >= torch.finfo(mask.dtype).min / 2)
        rows = rows.to(self.query.device).clamp(min=0)
        blank = torch.zeros(len(rows), 1, rows.shape[1], self.key.shape[2], device=rows.device)
        return seen._masked(blank, rows, self.query.shape[2]).isfinite()

    def _masked(self, logits: Tensor, rows: Tensor, length: int) -> Tensor:
        keys = logits.shape[-1]
        mask = self.mask
        if mask is None or mask.dim() == 2:
            if self.causal and length > 1:
                # the last query aligns with the last key: cached keys come before the first query
                steps = torch.arange(keys, device=logits.device)
                unseen = steps > (rows + keys - length)[..., None]
                logits = logits.masked_fill(unseen[:, None], float("-inf"))
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None, :keys].bool(), float("-inf"))
            return logits
        # as transformers' own attention functions do: a mask may cover more keys than there are
        mask = mask.expand(len(rows), *mask.shape[1:])[..., :keys]
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
        return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()


@dataclass(frozen=True)
class _Tap:
    inner: Callable[..., Any]
    show: Callable[[AttentionCall], None]


@dataclass(frozen=True)
class _Taps:
    """Taps of one module by thread, and the module's original config."""

    config: Any
    by_thread: dict[int, _Tap] = field(default_factory=dict)


_LOCK = threading.Lock()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    taps: _Taps | None = module.__dict__.get(_TAP)
    tap = None if taps is None else taps.by_thread.get(threading.get_ident())
    if tap is None:  # the module is tapped by another thread, or its tap was removed during this call
        inner = _implementation(module, module.config if taps is None else taps.config)
        return inner(module, query, key, value, attention_mask, **kwargs)
    output = tap.inner(module, query, key, value, attention_mask, **kwargs)
    _show(module, tap, query, key, value, attention_mask, kwargs)
    return output


def _show(
    module: nn.Module,
    tap: _Tap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(
            f"attention of {type(module).__name__} has sink logits, which the attention tap does not support"
        )
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and attention_mask is None:  # flash attention of several sequences in one
        steps = torch.arange(query.shape[2], device=query.device)
        number = torch.bucketize(steps, ends[1:].to(query.device), right=True)
        attention_mask = (number[:, None] == number)[None, None]
    seen = AttentionCall(
        query.detach(),
        key.detach(),
        value.detach(),
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        kwargs.get("softcap"),
    )
    tap.show(seen)


_tapped_attention._torchdynamo_disable_msg = REASON
AttentionInterface.register(_NAME, _tapped_attention)


@contextmanager
def tap(
    modules: Mapping[nn.Module, Callable[[AttentionCall], None]], instead: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Pass every call of these attention modules to its callback while the context is open.

    Args:
        modules: attention modules and their callbacks.
        instead: replaces the attention function, if only queries and keys are needed.

    Raises:
        UnsupportedError: a module does not use transformers' attention interface, or is already tapped.
    """
    with ExitStack() as undo:
        for module, show in modules.items():
            undo.callback(_install(module, show, instead))
        yield


def _install(
    module: nn.Module, show: Callable[[AttentionCall], None], instead: Callable[..., Any] | None
) -> Callable[[], None]:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise UnsupportedError(
            f"{type(module).__name__} has no config with an attention implementation: it does not use "
            "transformers' attention interface, so its attention cannot be read"
        )
    thread = threading.get_ident()
    with _LOCK:
        taps: _Taps = module.__dict__.get(_TAP) or _Taps(module.config)
        before = taps.by_thread.get(thread)
        if before is not None and instead is None:
            raise UnsupportedError(
                f"{type(module).__name__} is already tapped; one pruning context per model at a time"
            )
        taps.by_thread[thread] = _Tap(instead or _implementation(module, taps.config), show)
        if _TAP not in module.__dict__:
            module.__dict__[_TAP] = taps
            # a copy for this module only: the model creates masks from the config that all layers share
            private = copy.copy(taps.config)
            private._attn_implementation_internal = _NAME
            module.config = private

    def remove() -> None:
        with _LOCK:
            if before is not None:
                taps.by_thread[thread] = before
                return
            del taps.by_thread[thread]
            if not taps.by_thread:
                module.config = taps.config
                del module.__dict__[_TAP]

    return remove


def _implementation(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that a module with this config runs."""
    name = config._attn_implementation or "eager"
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name, eager)
    if found is None:
        raise UnsupportedError(
            f"attention implementation {name!r} of {type(module).__name__} is not known to transformers"
        )
    return found  # type: ignore[no-any-return]
