"""Cases of single families that the tiny configurations and pictures do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vlm_families import FAMILIES
from vlm_watching import Reader, blocks_of, read

from tokenprune.core.reads import Embeddings, Projector, TowerFeatures, TowerStates


@pytest.mark.parametrize("choice", ["st_argmax", "gumbel_argmax"])
def test_one_visual_word_a_token_of_ovis2(choice):
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


def test_patches_of_lighton_ocr_that_are_in_no_token():
    """Of 5 × 7 patches the last row and the last column, and the next image begins behind them."""
    family, states = FAMILIES["lighton_ocr"], []
    model, inputs = family.build(), family.inputs([[(20, 28), (12, 8)]])
    handle = blocks_of(model)[0].register_forward_hook(lambda module, args, output: states.append(output[0]))
    seen, trace = read(model, Reader(TowerFeatures(), Embeddings(), Projector(), TowerStates(1, 1)), inputs)
    handle.remove()
    assert trace.layout.counts.tolist() == [6 + 1]
    first, second = states[0][:35].view(5, 7, -1), states[0][35:].view(3, 2, -1)
    expected = torch.stack([first[2:4, 4:6].mean((0, 1)), second[:2].mean((0, 1))])
    assert torch.allclose(seen["tower_states"][0, 5:], expected, atol=1e-6)
    assert seen["grid"][0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0]]
    assert torch.allclose(seen["project"](seen["features"]), seen["embeddings"], atol=1e-5)
