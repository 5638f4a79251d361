"""How often a sweep kept each place, counted beside the store's own stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import SIDE

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.sweeps.results import keep_rates

pytestmark = pytest.mark.usefixtures("fakes")
CONFIG: dict[str, Any] = {
    "models": "fake",
    "datasets": "rectangles",
    "strategies": ["none", "uniform", "csp"],
    "limit": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tp.sweep({**CONFIG, "budgets": [0.5, 0.75]}, folder)
    return folder


def test_rates_are_the_mean_of_what_was_kept(run: Path) -> None:
    rates = keep_rates(run)
    table = tp.read_results(run, stages=True)
    assert {label for _, label in rates} == {*table.label} - {"none"}
    assert set(table.model) == {model for model, _ in rates}
    for (model, label), prior in rates.items():
        of = table[(table.model == model) & (table.label == label)]
        expected = np.zeros(SIDE**2)
        for stages in of.stages:
            for token in stages[-1]["kept"]:
                expected[token] += 1 / len(of)
        np.testing.assert_allclose(prior.resized(SIDE, SIDE).flatten().numpy(), expected, atol=1e-6)
    uniform = rates[model, "uniform at 0.5"].resized(SIDE, SIDE)
    assert set(uniform.flatten().tolist()) == {0.0, 1.0}
    assert uniform.sum() == SIDE**2 // 2


def test_of_one_stage(run: Path) -> None:
    rates = keep_rates(run, stage="scatter")
    assert {label for _, label in rates} == {"csp at 0.5", "csp at 0.75"}
    assert all(torch.equal(prior.resized(SIDE, SIDE), torch.ones(SIDE, SIDE)) for prior in rates.values())
    with pytest.raises(InputError, match=r"holds no stage 'scater'; known: cluster, .*scatter"):
        keep_rates(run, stage="scater")


def test_without_stages_it_is_refused(tmp_path: Path) -> None:
    tp.sweep({**CONFIG, "limit": 1}, tmp_path / "run", keep_masks=False)
    assert tp.read_results(tmp_path / "run", stages=True).stages.isna().all()
    assert "stages" not in tp.read_results(tmp_path / "run")
    with pytest.raises(InputError, match="holds no stages"):
        keep_rates(tmp_path / "run")
