"""`tokens.images()`: every active token in exactly one image or crop, quotas that sum to the target, a row as alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_bench import Bench
from torch import Tensor

from tokenprune.core.decisions import Keep
from tokenprune.core.reads import Crops
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import ImageTokens, Tokens

QUICK = settings(max_examples=60, deadline=None)
ROWS = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=3).filter(any)


class Asks(Strategy):
    """One stage of half of the tokens, with or without crops."""

    name = "asks"

    def __init__(self, reads: tuple[Any, ...]) -> None:
        super().__init__()
        self.reads = reads

    def stages(self, shape: Any) -> Any:
        """The stage."""
        yield Stage("half", 2, (shape.image_tokens + 1) // 2, self.reads)

    def choose(self, stage: Stage, tokens: Tokens) -> Keep:
        """Never asked."""
        raise AssertionError


def view(rows: list[list[int]], inactive: list[set[int]], crops: Tensor | None = None) -> Tokens:
    """The tokens of a batch on entering the stage, those of `inactive` dropped before."""
    bench = Bench(Asks(() if crops is None else (Crops(),)), rows, given={} if crops is None else {"crops": crops})
    active = bench.state.active.clone()
    for row, gone in enumerate(inactive):
        active[row, [token for token in gone if token < active.shape[1]]] = False
    planned = bench.planned[0]
    target = torch.minimum(planned.target, active.sum(1))
    return bench._view(planned, replace(bench.state, active=active), target)


def told(images: list[ImageTokens]) -> list[tuple[int, list[int], int]]:
    return [(one.image, one.index.tolist(), one.quota) for one in images]


@QUICK
@given(ROWS, st.data())
def test_every_active_token_once_and_quotas_sum_to_the_target(rows: list[list[int]], data: st.DataObject) -> None:
    inactive = [data.draw(st.sets(st.integers(0, 35))) for _ in rows]
    for least in (0, 1):
        tokens = view(rows, inactive)
        by_row = tokens.images_by_row(least=least)
        assert len(by_row) == len(rows)
        assert told(tokens.images(least=least)) == told([image for images in by_row for image in images])
        for row, images in enumerate(by_row):
            found = [token for image in images for token in image.index.tolist()]
            assert found == tokens.active[row].nonzero().flatten().tolist()
            assert sum(image.quota for image in images) == int(tokens.target[row])
            assert all(image.row == row and 0 <= image.quota <= len(image) > 0 for image in images)
            ends = torch.tensor([0, *rows[row]]).cumsum(0).tolist()
            assert all(ends[one.image] <= token < ends[one.image + 1] for one in images for token in one.index.tolist())
            if least and int(tokens.target[row]) >= len(images):
                assert all(image.quota for image in images)
            exact = [int(tokens.target[row]) * len(image) / max(1, len(found)) for image in images]
            assert least or all(abs(image.quota - share) < 1 for image, share in zip(images, exact, strict=True))


@QUICK
@given(ROWS, st.data())
def test_a_row_in_a_batch_is_the_row_alone(rows: list[list[int]], data: st.DataObject) -> None:
    inactive = [data.draw(st.sets(st.integers(0, 35))) for _ in rows]
    together = view(rows, inactive).images_by_row()
    for row, images in enumerate(rows):
        if images:
            assert told(together[row]) == told(view([images], [inactive[row]]).images())
        else:
            assert together[row] == []


@QUICK
@given(ROWS, st.data())
def test_crops_divide_images_where_the_stage_reads_them(rows: list[list[int]], data: st.DataObject) -> None:
    inactive = [data.draw(st.sets(st.integers(0, 35))) for _ in rows]
    plain = view(rows, inactive)
    crops = torch.where(plain.exists, 2 * plain.image + torch.arange(plain.exists.shape[1]) // 2 % 2, -1)
    tokens = view(rows, inactive, crops)
    for row, images in enumerate(tokens.images_by_row()):
        assert (
            sorted(n for one in images for n in one.index.tolist()) == tokens.active[row].nonzero().flatten().tolist()
        )
        assert sum(one.quota for one in images) == int(tokens.target[row])
        assert [(one.image, int(crops[row, one.index[0]])) for one in images] == sorted(
            {(int(plain.image[row, n]), int(crops[row, n])) for one in images for n in one.index.tolist()}
        )
        assert all(crops[row, one.index].unique().numel() == 1 for one in images)
        assert all(one.index.tolist() == sorted(one.index.tolist()) for one in images)
