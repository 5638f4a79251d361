"""The definition of pruning, computed slowly: every layer on the full sequence, with masks.

In layer l, positions that are not active are masked as keys, and their hidden states pass through unchanged. The
engine, which computes on shortened sequences, must give the same. Nothing here uses the engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.core.decisions import Keep, Merge
from tokenprune.core.layout import SequenceLayout
from tokenprune.errors import InputError
from tokenprune.testing.scripted import Scripted, Step


def masked_full_length(
    decoder: Any, embeds: Tensor, layout: SequenceLayout, script: Scripted, position_ids: Tensor, *, decoded: int = 0
) -> Tensor:
    """Final hidden states (after the final norm) [batch, S, width] of a scripted schedule; gradients flow.

    Args:
        decoder: a decoder stack of LLaMA's or Gemma 3's shape (layers, rotary_emb, norm), sliding windows and chunks
            included.
        embeds: [batch, S, width].
        layout: of the batch.
        script: the decisions.
        position_ids: int64 [batch, S] (or [3, batch, S]), the positions that the untouched model would use.
        decoded: how many of the last positions come after the prefill: tokens that a later stage removes from the
            caches of earlier layers are masked for them alone.

    Raises:
        InputError: some layers keep a state.
    """
    _check_masks(decoder)
    hidden = embeds.clone()
    present = layout.valid.clone()
    alive = all_active(layout)
    renumbered: Tensor | None = None
    removed = _removed_from_caches(embeds, layout, script, len(decoder.layers))
    for number, layer in enumerate(decoder.layers):
        for step in script.steps:
            if step.layer == number:
                hidden = apply_step(step, hidden, layout, alive)
                present = (layout.valid & ~layout.image_tokens) | alive["active"]
                if (step.positions or script.positions) == "renumber":
                    counted = (present.long().cumsum(1) - 1).clamp(min=0)
                    before = position_ids if renumbered is None else renumbered
                    renumbered = counted if step.rows is None else torch.where(step.rows[:, None], counted, before)
        ids = position_ids if renumbered is None else renumbered
        output = layer(
            hidden,
            attention_mask=_mask(
                present,
                _seen(decoder.config, number, layout.valid),
                removed[number],
                decoded,
            ),
            position_embeddings=rotary_tables(decoder, number, hidden, ids),
            position_ids=ids,
        )
        hidden = torch.where(present[..., None], output, hidden)
    normed: Tensor = decoder.norm(hidden)
    return normed


@contextmanager
def masked(decoder: Any, layout: SequenceLayout, script: Scripted) -> Iterator[None]:
    """A context in which calls without cache, of any model around `decoder`, compute the oracle of a scripted schedule.

    The model makes its own masks and positions, so that decoders of any kind work (`masked_full_length` makes them
    itself). Image tokens are those of `layout`: every call must have the same prompts.

    Args:
        decoder: the module with the decoder layers, `decoder.layers`; a binding's `decoder`.
        layout: of the prompts, for example `run.trace.layout`.
        script: the decisions.

    Raises:
        InputError: the script renumbers positions, or some layers keep a state.
    """
    _check_masks(decoder)
    if any((step.positions or script.positions) == "renumber" for step in script.steps):
        raise InputError(
            "masked() keeps the model's positions, but the script renumbers them; use masked_full_length()"
        )
    walk = _Masked(layout, script)
    with ExitStack() as undo:
        for number, layer in enumerate(decoder.layers):
            undo.callback(layer.register_forward_pre_hook(partial(walk.before, number), with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(walk.after).remove)
        yield


class _Masked:
    """The hooks of `masked`."""

    def __init__(self, layout: SequenceLayout, script: Scripted) -> None:
        self.layout, self.script = layout, script
        self._present: Tensor
        self._alive: dict[str, Tensor]
        self._before: Tensor
        self._after: Tensor | None
        self._ran: Tensor

    def before(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a layer."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if number == 0:
            self._present, self._after = self.layout.valid.clone(), None
            self._alive = all_active(self.layout)
        if self._after is not None:  # additions between layers (DeepStack) apply to active positions only
            hidden = torch.where(self._ran[..., None], hidden, self._after)
        for step in self.script.steps:
            if step.layer == number:
                hidden = apply_step(step, hidden, self.layout, self._alive)
                self._present = (self.layout.valid & ~self.layout.image_tokens) | self._alive["active"]
        self._before, self._ran = hidden, self._present
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), hidden)
        return (hidden, *args[1:]), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of a layer."""
        first = output[0] if isinstance(output, tuple) else output
        self._after = torch.where(self._ran[..., None], first, self._before)
        return (self._after, *output[1:]) if isinstance(output, tuple) else self._after

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        if mask is None:  # transformers' form of a plain causal mask
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
        seen = self._ran[:, None, None, :]
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)  # their output is discarded
        if mask.dtype == torch.bool:
            return (mask & seen) | itself
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).masked_fill(itself, 0)


def _check_masks(decoder: Any) -> None:
    kinds = {*(getattr(decoder.config, "layer_types", None) or ())} & {"linear_attention", "conv"}
    if kinds:
        raise InputError(
            f"the masked oracle was asked of layers of type {', '.join(sorted(kinds))}, from which no mask hides a "
            "token; compare with the layers on shortened sequences instead"
        )


def _seen(config: Any, layer: int, valid: Tensor) -> Tensor:
    """Bool [batch or 1, S, S], the keys that a layer of this kind sees, pruned ones and padding included."""
    places = torch.arange(valid.shape[1])
    causal = places[None, :] <= places[:, None]
    types = getattr(config, "layer_types", None)
    kind = "sliding_attention" if types is None else types[layer]
    if kind == "chunked_attention":  # counted from the first token of a row
        chunks = (places - valid.int().argmax(1, keepdim=True)).div(config.attention_chunk_size, rounding_mode="floor")
        return causal & (chunks[:, None, :] == chunks[:, :, None])
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    return (causal if window is None else causal & (places[:, None] - places[None, :] < window))[None]


def rotary_tables(decoder: Any, layer: int, hidden: Tensor, ids: Tensor) -> Any:
    """The decoder's rotary tables (cos, sin) for that layer at positions `ids`."""
    if "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters:
        return decoder.rotary_emb(hidden, position_ids=ids, layer_type=decoder.config.layer_types[layer])
    return decoder.rotary_emb(hidden, position_ids=ids)


def _removed_from_caches(embeds: Tensor, layout: SequenceLayout, script: Scripted, layers: int) -> list[Tensor]:
    """Per layer, bool [batch, S], the image tokens that its cache loses after the prefill."""
    removed = [torch.zeros_like(layout.image_tokens) for _ in range(layers)]
    alive = all_active(layout)
    for step in script.steps:
        apply_step(step, embeds, layout, alive)
        if step.prune_earlier_caches:
            gone = layout.image_tokens & ~alive["active"]
            rows = torch.tensor([step.is_for(row) for row in range(len(gone))])
            for earlier in removed[step.caches_from : step.layer]:
                earlier |= gone & rows[:, None]
    return removed


def _mask(present: Tensor, seen: Tensor, removed: Tensor, decoded: int) -> Tensor:
    length = present.shape[1]
    itself = torch.eye(length, dtype=torch.bool)  # hidden positions see themselves: their output is discarded
    later = (torch.arange(length) >= length - decoded)[:, None]
    seen = (seen & present[:, None, :] & ~(later & removed[:, None, :])) | itself
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def all_active(layout: SequenceLayout) -> dict[str, Tensor]:
    """The initial state for `apply_step`: bool [batch, S] each, every image token active and none parked."""
    return {"active": layout.image_tokens.clone(), "parked": torch.zeros_like(layout.image_tokens)}


def apply_step(step: Step, hidden: Tensor, layout: SequenceLayout, alive: dict[str, Tensor]) -> Tensor:
    """The states [batch, S, width] after a decision; `alive` (active, parked) is changed in place.

    Raises:
        InputError: a chosen position that is not active or, for a restore, not parked.
    """
    decision = step.decision
    hidden = hidden.clone()
    before = hidden.clone()
    for row, numbers in enumerate(decision.index.tolist()):
        if not step.is_for(row):
            continue
        slots = layout.image_tokens[row].nonzero().flatten().tolist()
        chosen = [slots[n] for n in numbers if n >= 0]
        for k, slot in enumerate(chosen):
            if isinstance(decision, Merge) and decision.values is None:
                parts = [decision.weights[row, k, j] * before[row, slots[j]] for j in range(len(slots))]
                hidden[row, slot] = torch.stack(parts).sum(0)
            elif decision.values is not None:
                hidden[row, slot] = decision.values[row, k]
        active, parked = alive["active"][row], alive["parked"][row]
        pool = active if isinstance(decision, (Keep, Merge)) else parked
        if not bool(pool[chosen].all()):
            raise InputError(f"the script chooses positions {chosen} of row {row}, which are not all there to choose")
        if isinstance(decision, (Keep, Merge)):
            for number, slot in enumerate(slots):
                given = isinstance(decision, Merge) and any(
                    bool(decision.weights[row, k, number] != 0) for k in range(len(chosen))
                )
                if bool(active[slot]) and slot not in chosen and decision.rest == "park" and not given:
                    parked[slot] = True
            active[:] = False
        active[chosen], parked[chosen] = True, False
    return hidden
