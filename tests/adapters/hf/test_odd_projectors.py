"""Ovis2 with other ways to choose visual words than that of the tiny configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vlm_families import FAMILIES
from vlm_watching import Reader, read

from tokenprune.core.reads import Embeddings, Projector, TowerFeatures


@pytest.mark.parametrize("choice", ["st_argmax", "gumbel_argmax"])
def test_one_word_a_token(choice):
    """A word that is drawn may be another than the likeliest."""

    def config():
        made = FAMILIES["ovis2"].config()
        made.vision_config.tokenize_function = choice
        return made

    family = replace(FAMILIES["ovis2"], config=config)
    model = family.build()
    torch.manual_seed(0)
    seen, _ = read(
        model, Reader(TowerFeatures(), Embeddings(), Projector()), family.inputs([(24, 32), (40, 20), (20, 20)])
    )
    alike = (seen["project"](seen["features"]) - seen["embeddings"]).abs().amax(-1) < 1e-5
    assert alike.all() if choice == "st_argmax" else alike.any() and not alike.all()
