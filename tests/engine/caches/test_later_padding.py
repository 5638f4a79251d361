"""Later turns of a batch, which pad the rows that say less: each row gives what it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlm_families import FAMILIES

import tokenprune as tp
from tokenprune.core.decisions import Keep
from tokenprune.core.stage import Stage
from tokenprune.core.strategy import Strategy
from tokenprune.testing.tiny_decoders import tiny_llama

PROMPT = 24
FIRST = [torch.arange(1, 25), torch.arange(4, 23)]  # the second one is padded
LATER = [torch.tensor([30, 31]), torch.tensor([40, 41, 42, 43, 44])]
STEP = torch.tensor([[50], [51]])


class Ragged(Strategy):
    """Another number of tokens in each row."""

    name = "ragged"

    def __init__(self, positions: Any, layer: int = 1, first: int = 0) -> None:
        super().__init__()
        self.positions, self._layer, self._first = positions, layer, first

    def stages(self, shape: Any) -> list[Stage]:
        """One."""
        return [Stage("thin", self._layer)]

    def choose(self, stage: Stage, tokens: Any) -> Keep:
        """The first 2, 5, … tokens of row 0, 1, …"""
        rows, count = tokens.exists.shape
        kept = 2 + 3 * (self._first + torch.arange(rows))
        return Keep.where(tokens.exists & (torch.arange(count) < kept[:, None]))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [batch, longest]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, own in enumerate(rows):
        where = slice(longest - len(own), None) if side == "left" else slice(0, len(own))
        ids[row, where], mask[row, where] = own, 1
    return ids, mask


def marks(mask: torch.Tensor) -> torch.Tensor:
    """Each row's tokens 4 to 14 are the image's."""
    number = mask.cumsum(1) - 1
    return (mask > 0) & (number >= 4) & (number < 15)


@torch.no_grad()
def turns(model: Any, strategy: Strategy, rows: list[int], sides: tuple[str, str], explicit: bool) -> list[Any]:
    """Logits of the second turn's real tokens and of the step after it, for each row."""
    first, mask = padded([FIRST[row] for row in rows], sides[0])
    later, seen = padded([LATER[row] for row in rows], sides[1])
    both, whole = torch.cat((mask, seen), 1), torch.cat((mask, seen, torch.ones(len(rows), 1, dtype=torch.long)), 1)

    def place(mask: torch.Tensor, new: int) -> dict[str, torch.Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]} if explicit else {}

    with tp.prune(model, strategy, image_tokens=marks(mask)):
        cache = model(first, attention_mask=mask, use_cache=True, **place(mask, first.shape[1])).past_key_values
        new = place(both, later.shape[1])
        logits = model(later, attention_mask=both, past_key_values=cache, **new).logits
        after = model(STEP[rows], attention_mask=whole, past_key_values=cache, **place(whole, 1)).logits
    return [(logits[row][seen[row].bool()], after[row]) for row in range(len(rows))]


@pytest.mark.parametrize("sides", [("left", "left"), ("right", "left"), ("left", "right"), ("right", "right")], ids=str)
@pytest.mark.parametrize(
    ("positions", "layer", "explicit"),
    [("renumber", 0, False), ("renumber", 0, True), ("renumber", 1, True), ("keep", 1, True)],
)
def test_a_later_turn_is_that_of_the_row_alone(
    positions: str, layer: int, explicit: bool, sides: tuple[str, str]
) -> None:
    """Where no position ids are given, positions renumbered go by the mask, as in the first turn; others do not."""
    model = tiny_llama(4)
    together = turns(model, Ragged(positions, layer), [0, 1], sides, explicit)
    for row in (0, 1):
        alone = turns(model, Ragged(positions, layer, first=row), [row], sides, explicit)
        for found, expected in zip(together[row], alone[0], strict=True):
            assert (found - expected).abs().max() < 3e-5


def test_a_later_turn_without_a_mask_counts_all_tokens() -> None:
    model, strategy = tiny_llama(4), Ragged("renumber")
    ids, image = torch.stack([FIRST[0], FIRST[0]]), marks(torch.ones(2, PROMPT, dtype=torch.long))
    later = torch.stack([LATER[1], LATER[1].flip(0)])
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=image):
        cache = model(ids, use_cache=True).past_key_values
        got = model(later, past_key_values=cache).logits
        step = model(STEP, past_key_values=cache).logits
    whole = torch.cat((ids, later, STEP), 1)
    with torch.no_grad(), tp.prune(model, strategy, image_tokens=marks(torch.ones_like(whole))):
        expected = model(whole, use_cache=False).logits
    assert (torch.cat((got, step), 1) - expected[:, PROMPT:]).abs().max() < 3e-5


@pytest.mark.parametrize("strategy", ["divprune", "prumerge+", "visionzip"])
@pytest.mark.parametrize("name", ["llava", "paligemma"])
@torch.no_grad()
def test_generating_in_a_later_turn_of_a_batch(name: str, strategy: str) -> None:
    """paligemma gives its decoder masks of another form, in which padding cannot be counted."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs([(24, 32), (40, 20)], texts=[(4, 6), (4, 6)])
    if strategy == "visionzip" and name == "paligemma":
        pytest.skip("its tower has no [CLS]")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}

    def said(rows: list[int]) -> torch.Tensor:
        given = one(inputs, rows)
        later, seen = padded([LATER[row] for row in rows], "left")
        with tp.prune(model, tp.strategy(strategy, budget=0.5)):
            output = model.generate(**given, **options)
            kept = output.past_key_values.get_seq_length()
            ids = torch.cat((output.sequences[:, :kept], later), 1)
            mask = torch.cat(
                (given["attention_mask"], torch.ones(len(rows), kept - given["input_ids"].shape[1]), seen), 1
            )
            more = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": output.past_key_values}
            if "token_type_ids" in given:
                more["token_type_ids"] = torch.zeros_like(ids)
            scores = model.generate(**more, **options).scores
        return torch.stack(scores, 1)

    together = said([0, 1])
    for row in (0, 1):
        found, expected = together[row], said([row])[0]
        found, expected = (score.masked_fill(score.isinf(), 0) for score in (found, expected))
        assert (found - expected).abs().max() < 1e-4


def one(inputs: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """The inputs of these rows, each of which has one picture, without what pads all of them."""
    width = int(inputs["attention_mask"][rows].sum(1).max())
    cut = {"input_ids", "attention_mask", "token_type_ids"}
    return {name: value[rows][:, -width:] if name in cut else value[rows] for name, value in inputs.items()}
