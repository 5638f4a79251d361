"""Positions renumbered under every kind of rotary scaling: what a sequence shortened by hand would have got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune import prune
from tokenprune.core.decisions import Keep
from tokenprune.testing.scripted import Scripted, Step
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH, LIMIT = 4, 32, 12  # LIMIT: the positions that the model was trained for
HALF = WIDTH // 4 // 2
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * HALF,
        "long_factor": [2.0 + n for n in range(HALF)],
        "original_max_position_embeddings": LIMIT,
    },
}
LENGTHS = {"both longer than trained for": (30, 18), "the full one longer": (30, 8), "both shorter": (10, 6)}


def fresh(kind: str) -> Any:
    """A model that has seen no sequence yet; always the same."""
    scaling = None if kind == "default" else {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]}
    return tiny_llama(LAYERS, max_position_embeddings=LIMIT, rope_scaling=scaling)


def drawn(length: int) -> Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))


def kept_of(length: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens bool [1, length] (all but the first and the last two), those kept [1, N], positions that stay."""
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, 1:-2] = True
    chosen = torch.zeros(1, length - 3, dtype=torch.bool)
    chosen[0, torch.randperm(length - 3, generator=torch.Generator().manual_seed(1))[: kept - 3]] = True
    stays = ~image[0]
    stays[1:-2] = chosen[0]
    return image, chosen, stays


def rotary_state(model: Any) -> dict[str, Any]:
    rotary = model.model.rotary_emb
    plain = {name: value for name, value in rotary.__dict__.items() if name.endswith(("_cached", "_scaling", "_len"))}
    return {**{name: buffer.tolist() for name, buffer in rotary.named_buffers()}, **plain}


@torch.no_grad()
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stage_before_the_decoder_is_the_shortened_input(kind: str, lengths: str) -> None:
    """Prefill and decoding, and the model's rotary module is left as the untouched model leaves it."""
    length, kept = LENGTHS[lengths]
    image, chosen, stays = kept_of(length, kept)
    embeds, model, untouched, shortened = drawn(length + 3), fresh(kind), fresh(kind), fresh(kind)
    strategy = Scripted([Step(0, Keep.where(chosen))], positions="renumber")
    caches: dict[str, Any] = dict.fromkeys(("pruned", "untouched", "shortened"))

    def run(name: str, of: Any, part: Tensor) -> Tensor:
        output = of.model(inputs_embeds=part, past_key_values=caches[name], use_cache=True)
        caches[name] = output.past_key_values
        return output.last_hidden_state[0]

    with prune(model, strategy, image_tokens=image):
        for first, last in [(0, length), (length, length + 1), (length + 1, length + 3)]:
            part = embeds[:, first:last]
            found = run("pruned", model, part)
            run("untouched", untouched, part)
            expected = run("shortened", shortened, part if first else part[:, stays])
            assert (found[stays if first == 0 else slice(None)] - expected).abs().max() < 2e-5
            assert rotary_state(model) == rotary_state(untouched)


@torch.no_grad()
@pytest.mark.parametrize("lengths", list(LENGTHS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stage_in_the_decoder_runs_on_with_the_tables_of_the_shortened_input(kind: str, lengths: str) -> None:
    """Also after the model has seen other lengths, which the untouched one keeps to."""
    length, kept = LENGTHS[lengths]
    image, chosen, stays = kept_of(length, kept)
    embeds, model = drawn(length), fresh(kind)
    with prune(model, Scripted([Step(2, Keep.where(chosen))], positions="renumber"), image_tokens=image):
        first = model.model(inputs_embeds=embeds).last_hidden_state[0]
        again = model.model(inputs_embeds=embeds).last_hidden_state[0]
    assert torch.equal(first, again)
    by_hand = fresh(kind)
    hidden = by_hand.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[2][:, stays]
    tables = fresh(kind).model.rotary_emb(hidden, position_ids=torch.arange(kept)[None])
    for layer in by_hand.model.layers[2:]:
        output = layer(hidden, attention_mask=None, position_embeddings=tables)
        hidden = output[0] if isinstance(output, tuple) else output
    assert (first[stays] - by_hand.model.norm(hidden)[0]).abs().max() < 2e-5
