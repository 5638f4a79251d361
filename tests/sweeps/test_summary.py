"""The numbers of a sweep's table, against numpy on the masks of the store."""

from __future__ import annotations

from pathlib import Path

import dataset_files
import numpy as np
import pytest

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.sweeps.results import stored_masks
from tokenprune.sweeps.store import reading
from tokenprune.sweeps.summary import NEEDED, summarised

pytestmark = pytest.mark.usefixtures("fakes")


def test_queries_without_a_target(tmp_path: Path) -> None:
    """N-acc and T-acc count masks, whatever the table has in place of a size."""
    data = dataset_files.reasonseg(tmp_path)
    run = tmp_path / "run"
    tp.sweep({"models": "fake", "datasets": f"reasonseg:{data}", "strategies": "whole", "budgets": 1.0}, run)
    table = tp.read_results(run)
    (line,) = summarised(table)
    without, within = [], []
    with reading(run) as store:
        for number, scene in enumerate(tp.dataset(f"reasonseg:{data}").scenes("val")):
            for place, query in enumerate(scene.queries):
                ((mask, _),) = stored_masks(store, number, place, table.configuration.unique().tolist()).values()
                counted = np.asarray(query.mask) != 255
                answered = bool((mask & counted).any())
                if (np.asarray(query.mask) == 1).any():
                    within.append(answered)
                else:
                    without.append(not answered)
    assert without
    assert within
    assert line.no_target_accuracy == pytest.approx(np.mean(without))
    assert line.target_accuracy == pytest.approx(np.mean(within))


def test_a_table_without_a_column_that_is_needed(tmp_path: Path) -> None:
    tp.sweep({"models": "fake", "datasets": "rectangles", "strategies": "whole", "limit": 2}, tmp_path)
    table = tp.read_results(tmp_path)
    assert len(summarised(table[NEEDED])) == 1  # no other one is
    for name in NEEDED:
        with pytest.raises(InputError) as told:
            summarised(table.drop(columns=name))
        first = "dataset" if name == "model" else "model"
        assert str(told.value).startswith(f"table: no column {name}; found {first}, ")
