"""The read of a stored map: its values beside a resampling by hand, batches, grids, crops; files; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from safetensors.torch import save_file
from strategy_bench import Bench
from torch import Tensor

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.errors import InputError, OptionError
from tokenprune.testing.tiny_decoders import tiny_llama

QUICK = settings(max_examples=40, deadline=None)
SIDES = st.integers(1, 9)
GRIDS = st.lists(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), min_size=1, max_size=3)
MAP = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))


class ByPlace(tp.Strategy):
    """Keeps the tokens of highest prior, and notes what it read."""

    name = "by-place"
    budget_option = "keep"

    class Options(tp.StrategyOptions):
        """Options."""

        keep: float = Field(0.5, gt=0, le=1, description="share of the tokens")

    def __init__(self, prior: tp.PositionPrior | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.prior, self.seen = prior or tp.PositionPrior(MAP), list[Tensor]()

    def with_options(self, **changes: Any) -> tp.Strategy:
        """The copy shares the list."""
        copy = ByPlace(self.prior, **changes)
        copy.seen = self.seen
        return copy

    def stages(self, shape: tp.Shape) -> Any:
        """One."""
        yield tp.Stage("prune", 1, max(1, int(shape.image_tokens * self.options.keep)), self.prior)

    def choose(self, stage: tp.Stage, tokens: tp.Tokens) -> tp.Decision:
        """The highest."""
        self.seen.append(tokens.position_prior)
        assert tokens.read(tp.PositionPrior(self.prior.scores)) is tokens.position_prior  # equal maps are equal reads
        return Keep.top(tokens.position_prior.masked_fill(~tokens.active, -torch.inf), tokens.target)


def by_triangles(scores: Tensor, rows: int, columns: int) -> Tensor:
    """The map on another grid, row by row: weights fall linearly with the distance, to 0 at the coarser cell's size."""

    def weights(size: int, wanted: int) -> Tensor:
        scale = size / wanted
        centres = (torch.arange(wanted).double() + 0.5) * scale
        distance = (torch.arange(size).double() + 0.5 - centres[:, None]).abs()
        found = (1 - distance / max(scale, 1)).clamp(min=0)
        return found / found.sum(1, keepdim=True)

    height, width = scores.shape
    return (weights(height, rows) @ scores.double() @ weights(width, columns).T).float().flatten()


def seen_by(rows: list[list[tuple[int, int]]], **given: Any) -> Tensor:
    strategy = ByPlace(**given)
    bench = Bench(strategy, [[height * width for height, width in images] for images in rows], grids=rows).run()
    assert [len(kept) for kept in bench.trace.stages[0].kept] == bench.planned[0].target.tolist()
    (found,) = strategy.seen
    return found


@QUICK
@given(GRIDS)
def test_every_image_of_every_row_has_the_whole_map(rows: list[list[tuple[int, int]]]) -> None:
    found = seen_by(rows)
    assert found.dtype == torch.float32
    for row, images in enumerate(rows):
        expected = torch.cat([by_triangles(MAP, *grid) for grid in images])
        torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-5, rtol=0)
        assert not found[row, len(expected) :].any()
        torch.testing.assert_close(seen_by([images])[0], expected, atol=1e-5, rtol=0)


def test_on_its_own_grid_the_map_is_as_stored() -> None:
    assert torch.equal(seen_by([[(5, 7)]])[0], MAP.flatten())


def test_rows_whose_stages_are_at_different_layers_read_their_own() -> None:
    """With a budget, rows of different sizes may be different groups."""

    class Varying(ByPlace):
        name = "varying"

        def stages(self, shape: tp.Shape) -> Any:
            yield tp.Stage("prune", 1 + (shape.image_tokens > 10), shape.image_tokens // 2, self.prior)

    strategy = Varying()
    Bench(strategy, [[9], [16]], grids=[[(3, 3)], [(4, 4)]]).run()
    first, second = strategy.seen
    torch.testing.assert_close(first[0, :9], by_triangles(MAP, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(second[1], by_triangles(MAP, 4, 4), atol=1e-5, rtol=0)
    assert not first[1].any()
    assert not second[0].any()


def test_in_a_composition_a_place_stays_that_of_the_whole_image() -> None:
    """The part before drops the last rows of the grid; the map is not spread over what remains."""
    strategy = ByPlace()
    top = tp.PositionPrior([[2.0], [1.0], [0.0], [-1.0]])
    Bench(tp.Sequence(ByPlace(top), strategy), [[24]], grids=[[(4, 6)]]).run()
    torch.testing.assert_close(strategy.seen[0][0], by_triangles(MAP, 4, 6)[:12], atol=1e-5, rtol=0)


def test_on_a_decoder_with_cells_and_without() -> None:
    marks = torch.zeros(1, 20, dtype=torch.bool)
    marks[:, 2:17] = True
    grid = torch.full((1, 20, 2), -1)
    grid[0, 2:17] = torch.cartesian_prod(torch.arange(3), torch.arange(5))
    model, ids = tiny_llama(2), torch.arange(1, 21)[None]
    with torch.no_grad(), tp.prune(model, ByPlace(), image_tokens=marks, grid=grid) as run:
        model(ids)
    best = by_triangles(MAP, 3, 5).topk(7).indices.sort().values.tolist()
    assert run.trace.stages[0].kept == [best]
    assert tp.compatible(ByPlace(), model).reads == ("PositionPrior",)
    assert tp.compatible(ByPlace(), model).runs
    with (
        pytest.raises(
            InputError, match=r"PositionPrior\(5 × 7\): image 0 of batch row 0 has tokens without a grid cell"
        ),
        torch.no_grad(),
        tp.prune(model, ByPlace(), image_tokens=marks),
    ):
        model(ids)


def test_a_file_and_back(tmp_path: Path) -> None:
    file = tmp_path / "prior.safetensors"
    prior = tp.PositionPrior(MAP)
    prior.save(file)
    assert tp.PositionPrior.load(file) == prior == tp.PositionPrior(MAP.tolist()) == tp.PositionPrior(MAP.numpy())
    assert hash(tp.PositionPrior.load(str(file))) == hash(prior)
    assert torch.equal(tp.PositionPrior.load(file).resized(5, 7), MAP)
    save_file({"mine": (MAP + 1).half()}, file)  # by other means, and with another name
    assert torch.equal(tp.PositionPrior.load(file).resized(5, 7), (MAP + 1).half().float())


def test_the_mean_of_maps_of_several_sizes() -> None:
    small, wide, high = torch.rand(2, 3), torch.rand(2, 6), torch.rand(4, 3)
    expected = sum(by_triangles(one, 4, 6) for one in (small, small, wide, high)) / 4
    found = tp.PositionPrior.mean(iter([small, wide, small.numpy(), high])).resized(4, 6)
    torch.testing.assert_close(found.flatten(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (None, "was given None"),
        ("x", "was given 'x'"),
        ([[1.0], [2.0, 3.0]], r"was given \[\[1.0\], \[2.0, 3.0\]\]"),
        ([1.0], r"float32 of shape \[1\]"),
        (torch.zeros(2, 2, 2), r"of shape \[2, 2, 2\]"),
        (torch.zeros(0, 3), r"of shape \[0, 3\]"),
        (torch.zeros(2, 2) * 1j, "complex64 of shape"),
        ([[0.0, 1.0], [float("nan"), 2.0]], "nan found at row 1, column 0"),
        ([[0.0, float("inf")]], "inf found at row 0, column 1"),
    ],
)
def test_what_is_no_map_is_refused(scores: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=found):
        tp.PositionPrior(scores)
    with pytest.raises(InputError, match=found):
        tp.PositionPrior.mean([scores])
    if isinstance(scores, Tensor):
        save_file({"x": scores}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match=rf"x\.safetensors': .*{found}"):
            tp.PositionPrior.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [(0, 3), (-2, 3), (2, 1.5), (2, None)])
def test_sizes_that_no_grid_has_are_refused(size: Any) -> None:
    with pytest.raises(OptionError, match=r"(rows|columns): .* found, expected a whole number of at least 1"):
        tp.PositionPrior(MAP).resized(*size)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.safetensors': no such file"):
        tp.PositionPrior.load(tmp_path / "missing.safetensors")
    for content in (b"", b"no safetensors"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.safetensors' cannot be read \(.*\); expected a file of"):
            tp.PositionPrior.load(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        tp.PositionPrior.load(tmp_path)
    save_file({"a": MAP, "b": MAP + 1}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="holds 2 tensors; expected one"):
        tp.PositionPrior.load(tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="expected the path of a file"):
        tp.PositionPrior.load(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no maps"):
        tp.PositionPrior.mean([])
