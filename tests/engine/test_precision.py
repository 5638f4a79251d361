"""Half precision: scores are float32, results are the masked oracle's up to the rounding of the type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lisa_checkpoints import write_lisa

import tokenprune as tp
from tokenprune.core.decisions import Decision, Keep
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.reads import AttentionFrom
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.testing.oracle import masked_full_length
from tokenprune.testing.scripted import random_script
from tokenprune.testing.tiny_decoders import tiny_llama

LAYERS, WIDTH = 4, 32
# Rounding errors of a layer add up over four of them; states are of size 1 after the final norm.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
half = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Reader(Strategy):
    """Keeps the half with the highest attention, and notes the scores."""

    name = "reader"

    def stages(self, shape: Shape) -> Iterator[Stage]:
        yield Stage("prune", 2, shape.image_tokens // 2, (AttentionFrom("last"),))

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        self.scores = tokens.attention
        return Keep.top(tokens.attention, tokens.target)


def inputs(dtype: torch.dtype, rows: int = 2) -> tuple[torch.Tensor, SequenceLayout]:
    image, valid = torch.zeros(2, rows, 20, dtype=torch.bool)
    valid[:] = True
    valid[0, 18:] = False
    image[:, 2:14] = True
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, 20, WIDTH, generator=draw).to(dtype), SequenceLayout.from_mask(image, valid)


@half
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(4))
def test_pruned_runs_equal_the_oracle(dtype: torch.dtype, attention: str, seed: int) -> None:
    model = tiny_llama(LAYERS, kv_heads=2, attention=attention)
    embeds, layout = inputs(dtype)
    script = random_script(layout.slots >= 0, LAYERS, WIDTH, seed)
    ids = (layout.valid.long().cumsum(1) - 1).clamp(min=0)
    model.to(dtype)
    exact = tiny_llama(LAYERS, kv_heads=2, attention=attention)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = masked_full_length(exact.model, embeds.float(), layout, script, ids)
    with torch.no_grad(), tp.prune(model, script, image_tokens=layout.image_tokens):
        found = model.model(
            inputs_embeds=embeds, attention_mask=layout.valid.long(), position_ids=ids
        ).last_hidden_state
    assert found.dtype == dtype
    assert (found.float() - expected)[layout.valid].abs().max() < TOLERANCE[dtype]


@half
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_float32(dtype: torch.dtype, attention: str) -> None:
    embeds, layout = inputs(dtype)
    scores = []
    for kind in (dtype, torch.float32):
        model, reader = tiny_llama(LAYERS, attention=attention).to(dtype).to(kind), Reader()
        with torch.no_grad(), tp.prune(model, reader, image_tokens=layout.image_tokens):
            model(inputs_embeds=embeds.to(kind), attention_mask=layout.valid.long())
        scores.append(reader.scores)
    assert scores[0].dtype == torch.float32
    assert not torch.equal(scores[0], scores[0].to(dtype).float())  # not rounded on the way
    assert (scores[0] - scores[1]).abs().max() < TOLERANCE[dtype]


@half
@pytest.mark.parametrize("cached", [False, True])
def test_keep_all_is_bit_identical(dtype: torch.dtype, cached: bool) -> None:
    model = tiny_llama(LAYERS, kv_heads=2).to(dtype)
    embeds, layout = inputs(dtype)
    given: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "use_cache": cached}
    with torch.no_grad():
        plain = model(**given).logits
        for strategy in (tp.strategy("none"), tp.strategy("fastv", keep=1.0)):
            with tp.prune(model, strategy, image_tokens=layout.image_tokens):
                assert torch.equal(model(**given).logits, plain)


@half
def test_generation_with_a_cache(dtype: torch.dtype) -> None:
    model = tiny_llama(LAYERS, kv_heads=2).to(dtype)
    image = torch.zeros(1, 16, dtype=torch.bool)
    image[:, 2:12] = True
    ids = torch.arange(16)[None]
    with torch.no_grad(), tp.prune(model, tp.strategy("fastv"), image_tokens=image) as run:
        output = model.generate(
            ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert output.past_key_values.layers[-1].keys.dtype == dtype
    assert run.trace.ledger.entries[-1].image == (5,)
    # the first token's logits do not depend on the cache
    with torch.no_grad(), tp.prune(model, tp.strategy("fastv"), image_tokens=image):
        first = model(ids, use_cache=False).logits[:, -1]
    assert (output.logits[0].float() - first.float()).abs().max() < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lisa(tmp_path: Path, dtype: str) -> None:
    folder = write_lisa(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    exact, model = tp.load(folder), tp.load(folder, dtype=dtype)
    for part in ("decoder", "tower", "projector", "sam", "mask_projection"):
        rounded = getattr(model, part).state_dict()
        getattr(exact, part).load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    plain = model.segment(image, "the cat")
    assert torch.equal(model.segment(image, "the cat", strategy=tp.strategy("none")).mask_logits, plain.mask_logits)
    for name in ("csp", "fastv", "prumerge", "uniform"):
        strategy = tp.strategy(name, budget=0.5)
        low, high = (one.segment(image, "the cat", strategy=strategy) for one in (model, exact))
        stages = zip(low.trace.stages, high.trace.stages, strict=True)
        scores = [(a.scores, b.scores) for a, b in stages if a.scores is not None]
        assert all(a.dtype == torch.float32 for a, _ in scores), name
        assert torch.isfinite(low.mask_logits).all()
        assert all(torch.allclose(a, b, atol=0.05) for a, b in scores), name
