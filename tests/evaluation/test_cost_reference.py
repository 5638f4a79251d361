"""Published FLOPs figures, recomputed from declared ledgers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tokenprune
from tokenprune.core.decisions import Keep
from tokenprune.core.ledger import Ledger
from tokenprune.core.scheduling.plan import declared_ledger
from tokenprune.core.stage import Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.cost import DecoderSpec, Flops, count_flops

# FastV (arXiv 2403.06764), table 1: (K, R) -> average per layer in 1e9; 612 tokens, 576 of them image tokens.
FASTV = {
    "7b": {
        None: 99.3,
        (2, 0.90): 19.9,
        (2, 0.75): 32.8,
        (2, 0.50): 54.6,
        (3, 0.90): 22.8,
        (3, 0.75): 34.8,
        (3, 0.50): 56.6,
        (5, 0.90): 27.8,
        (5, 0.75): 39.7,
        (5, 0.50): 59.6,
    },
    "13b": {
        None: 154.6,
        (2, 0.90): 29.7,
        (2, 0.75): 50.2,
        (2, 0.50): 84.6,
        (3, 0.90): 33.0,
        (3, 0.75): 52.9,
        (3, 0.50): 86.4,
        (5, 0.90): 39.6,
        (5, 0.75): 58.4,
        (5, 0.50): 90.1,
    },
}
TOLERANCE = {"7b": 0.013, "13b": 0.004}

# PyramidDrop (arXiv 2410.17247), tables 1 and 6, LLMs of 7B: image tokens -> full, FastV, PyramidDrop in 1e12.
PDROP = {576: ("3.82", "2.01", "1.78"), 2880: ("20.8", "10.6", "9.5"), 2048: ("14.4", "7.4", "6.6")}


class _Halving(Strategy):
    """Half of the tokens after every quarter of the layers: PyramidDrop's schedule."""

    name = "halving"

    def stages(self, shape: Shape) -> Iterator[Stage]:
        for step in (1, 2, 3):
            yield Stage(f"step {step}", step * shape.layers // 4, shape.image_tokens >> step)

    def choose(self, stage: Stage, tokens: Tokens) -> Keep:
        return Keep.where(tokens.exists)


def _ledger(strategy: Strategy, spec: DecoderSpec, image: int, text: int) -> Ledger:
    return declared_ledger(strategy, Shape(spec.layers, image, text))


@pytest.mark.parametrize(("size", "setting"), [(size, setting) for size in FASTV for setting in FASTV[size]])
def test_fastv_table_1(size: str, setting: tuple[int, float] | None) -> None:
    spec = DecoderSpec.named(size)
    if setting is None:
        strategy = tokenprune.strategy("none")
    else:
        strategy = tokenprune.strategy("fastv", layer=setting[0], keep=1 - setting[1])
    ours = count_flops(_ledger(strategy, spec, 576, 36), spec, "fastv").per_layer / 1e9
    assert ours == pytest.approx(FASTV[size][setting], rel=TOLERANCE[size])


@pytest.mark.parametrize("image", PDROP)
@pytest.mark.parametrize("column", [0, 1, 2], ids=["full", "fastv", "pyramiddrop"])
def test_pyramiddrop_tables(image: int, column: int) -> None:
    spec = DecoderSpec.named("7b")
    strategy = (
        tokenprune.strategy("none"),
        tokenprune.strategy("fastv", layer=2, keep=0.5),
        _Halving(),
    )[column]
    published = PDROP[image][column]
    ours = count_flops(_ledger(strategy, spec, image, 36), spec, "pdrop").decoder / 1e12
    digits = len(published.split(".")[1])
    assert f"{ours:.{digits}f}" == published


def test_none_equals_the_unpruned_ledger() -> None:
    spec = DecoderSpec.named("7b")
    ledger = _ledger(tokenprune.strategy("fastv", layer=2, keep=0.5), spec, 576, 36)
    none = count_flops(_ledger(tokenprune.strategy("none"), spec, 576, 36), spec)
    full: Flops = count_flops(ledger.unpruned(), spec)
    assert full == none
    assert count_flops(ledger, spec).ratio(full) < 0.6
