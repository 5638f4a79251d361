"""Protocols: which queries are asked together, and which masks count, against computations of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fake_segmentation import FakeModel
from glamm_checkpoints import write_glamm
from hypothesis import given, settings
from hypothesis import strategies as st
from lisa_checkpoints import write_lisa
from pixellm_checkpoints import write_pixellm

import tokenprune as tp
from tokenprune.cli.commands.compare import Protocol
from tokenprune.datasets.base import Dataset, Query, Scene
from tokenprune.errors import IncompatibleError, InputError, OptionError
from tokenprune.evaluation import metrics
from tokenprune.evaluation.contenders import contenders
from tokenprune.evaluation.models import TurnTaking
from tokenprune.evaluation.protocols import PixelLM, ProtocolName, protocol_of
from tokenprune.evaluation.records import Record
from tokenprune.evaluation.scene_run import SceneRun, matched_overlap
from tokenprune.utils.masks import with_ignored

TEXTS = ["the cat", "the red car behind the tree", "a small dog", "the largest thing", "the sky"]


def scene(queries: int = 5) -> Scene:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (45, 60, 3), dtype=np.uint8)
    masks = generator.random((queries, 45, 60)) < 0.3
    return Scene("one", image, [Query(text, "phrase", mask) for text, mask in zip(TEXTS, masks, strict=False)])


def run(model: Any, protocol: str, seed: int = 0) -> dict[str, list[Record]]:
    """Records of two strategies on the scene."""
    chosen = contenders(["none", "fastv"], 0.7)
    found = SceneRun(TurnTaking(model), protocol, keep_masks=True, seed=seed).run(
        scene(), 3, dict(enumerate(chosen)), lambda number, call: call()
    )
    return {chosen[number].strategy.name: records for number, records in found.records.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    writers: dict[str, Callable[[Path], Path]] = {"lisa": write_lisa, "glamm": write_glamm, "pixellm": write_pixellm}
    return {name: tp.load(write(tmp_path_factory.mktemp(name))) for name, write in writers.items()}


def test_lisa_asks_each_query_in_a_conversation_of_its_own(models: dict[str, Any]) -> None:
    for name, model in models.items():
        found = run(model, "lisa")
        assert [record.query for record in found["fastv"]] == [0, 1, 2, 3, 4]
        for strategy, records in found.items():
            pruning = tp.strategy(strategy) if strategy == "none" else tp.strategy(strategy, budget=0.7)
            for record, query in zip(records, scene().queries, strict=True):
                alone = model.segment(scene().image, query.text, pruning, is_sentence=False)
                logits = alone.mask_logits[0].abs()
                differs = torch.from_numpy(record.mask) != alone.masks[0]
                assert not bool((differs & (logits > 1e-3)).any()), (name, strategy)


def test_forced_lets_the_model_batch(models: dict[str, Any]) -> None:
    together = models["glamm"].segment(scene().image, TEXTS, tp.strategy("none"), is_sentence=[False] * 5)
    found = run(models["glamm"], "forced")["none"]
    assert [record.mask.tolist() for record in found] == together.masks.tolist()
    assert {record.cost.image_tokens for record in found} == {found[0].cost.image_tokens}


def test_glamm_draws_three_sentences_by_the_seed(models: dict[str, Any]) -> None:
    found = run(models["glamm"], "glamm")
    numbers = [record.query for record in found["none"]]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 3
    assert [record.query for record in found["fastv"]] == numbers
    assert [record.query for record in run(models["glamm"], "glamm")["none"]] == numbers
    drawn = {tuple(protocol_of("glamm").asked(5, 3, seed)) for seed in range(100)}
    assert len(drawn) == 10  # every choice of three
    assert protocol_of("glamm").asked(2, 0, 0) == [0, 1]
    texts = [TEXTS[number] for number in numbers]
    alone = models["glamm"].segment(scene().image, texts, tp.strategy("none"), is_sentence=[False] * 3)
    assert [record.mask.tolist() for record in found["none"]] == alone.masks.tolist()


def test_glamm_refuses_other_models(models: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="asks each query in a conversation of its own, and protocol 'glamm'"):
        run(models["lisa"], "glamm")


def test_generate_needs_a_model_that_answers() -> None:
    with pytest.raises(IncompatibleError, match=r"takes no answer=, which protocol 'generate' needs; use 'forced'"):
        run(FakeModel(), "generate")


def test_unknown() -> None:
    with pytest.raises(OptionError, match="protocol 'guess' found, expected one of forced, lisa, glamm, pixellm"):
        protocol_of("guess")


@pytest.mark.parametrize("protocol", ["forced", "lisa", "glamm"])
def test_a_comparison_takes_a_protocol(models: dict[str, Any], protocol: Any) -> None:
    class Data(Dataset):
        name, splits, kinds = "two", ("val",), ("phrase",)

        def scenes(self, split: str, limit: int | None = None, seed: int = 0) -> Iterator[Scene]:
            for number in range(2):
                yield replace(scene(), id=str(number))

    found = tp.compare(models["glamm"], Data(), ["none", "fastv"], 0.7, protocol=protocol, limit=10, timing_samples=1)
    assert found.samples == (6 if protocol == "glamm" else 10)
    assert found.environment["protocol"] == protocol
    records = [run(models["glamm"], protocol)["none"]] if protocol != "glamm" else []
    for one in records:
        assert found.rows[0].giou == pytest.approx(metrics.giou([record.overlap for record in one]))
    for sample in found.records:
        assert [outcome.iou for outcome in sample.outcomes] == [
            pytest.approx(metrics.expression_iou(*metrics.overlap(outcome.mask, sample.target)))
            for outcome in sample.outcomes
        ]


def test_the_command_line_knows_all() -> None:
    assert {protocol.value for protocol in Protocol} == set(get_args(ProtocolName))


# PixelLM's matching --------------------------------------------------------------------------------------------------


def cost(logits: np.ndarray, target: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits))
    entropy = -np.where(target, np.log(p), np.log(1 - p)).mean()
    return float(entropy + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1))


def expected(logits: np.ndarray, targets: list[np.ndarray]) -> tuple[int, int, float]:
    """By trying every pairing; the lists are filled to the same length with empty masks, after the pairing."""
    short, long = min(len(logits), len(targets)), max(len(logits), len(targets))
    best: tuple[float, list[tuple[int, int]]] = (float("inf"), [])
    for order in permutations(range(long), short):
        pairs = [(a, b) if len(logits) <= len(targets) else (b, a) for a, b in zip(range(short), order, strict=True)]
        total = sum(cost(logits[mask], targets[target]) for mask, target in pairs)
        if total < best[0]:
            best = total, pairs
    used = [[pair[side] for pair in best[1]] for side in (0, 1)]
    nothing = np.zeros(logits.shape[1:], dtype=bool)
    together = [(logits[mask] > 0, targets[target]) for mask, target in best[1]]
    together += [(logits[n] > 0, nothing) for n in range(len(logits)) if n not in used[0]]
    together += [(nothing, targets[n]) for n in range(len(targets)) if n not in used[1]]
    inter = union = 0
    iou = 0.0
    for mask, target in together:
        i, u = int((mask & target).sum()), int((mask | target).sum())
        inter, union, iou = inter + i, union + u, iou + (i / (u + 1e-5) if u else 1.0)
    return inter, union, iou / long if long else 1.0


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_masks_are_matched_to_targets(masks: int, targets: int, empty: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (masks + empty, 6, 7))
    logits[masks:] = -np.abs(logits[masks:])
    wanted = [target for target in generator.random((targets, 6, 7)) < 0.4 if target.any()]
    (inter, union), iou = matched_overlap(torch.from_numpy(logits), wanted or [np.zeros((6, 7), dtype=bool)])
    assert (inter, union, iou) == pytest.approx(expected(logits, wanted), abs=1e-6)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_ignored_pixels_are_as_if_cut_out(masks: int, targets: int, seed: int) -> None:
    """The right columns are ignored: everything is as in the left part of the image alone."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (masks, 6, 9))
    wanted = list(generator.random((targets, 6, 9)) < 0.3) or [np.zeros((6, 9), dtype=bool)]
    without = np.zeros((6, 9), dtype=bool)
    without[:, 4:] = True
    found = matched_overlap(torch.from_numpy(logits), wanted, without)
    left = [target[:, :4] for target in wanted if target[:, :4].any()]
    inter, union, iou = expected(logits[:, :, :4], left)
    assert (*found[0], found[1]) == pytest.approx((inter, union, iou), abs=1e-6)


class Answering(FakeModel):
    """Answers every query freely with these masks, [n, H, W]."""

    found = torch.zeros(0, 30, 40, dtype=torch.bool)

    def segment(self, *args: Any, answer: str = "", max_new_tokens: int = 0, **options: Any) -> Any:
        given = super().segment(*args, **options)
        number = len(self.found)
        logits = torch.where(self.found, 5.0, -5.0)
        return SimpleNamespace(
            masks=self.found,
            mask_logits=logits,
            query_index=[0] * number,
            row_index=[0] * number,
            trace=given.trace,
        )


def answered(found: np.ndarray, target: np.ndarray) -> Record:
    """The record of an answer with these masks, asked as PixelLM's evaluation does."""
    model = Answering()
    model.found = torch.from_numpy(found)
    image = np.zeros((*target.shape, 3), dtype=np.uint8)
    one = Scene("one", image, [Query("the cat", "phrase", target)])
    chosen = dict(enumerate(contenders(["none"], 0.5)))
    ran = SceneRun(TurnTaking(model), "pixellm").run(one, 0, chosen, lambda number, call: call())
    (record,) = ran.records[0]
    return record


def test_pixellm_does_not_count_ignored_pixels() -> None:
    target, crowd = np.zeros((2, 30, 40), dtype=bool)
    target[:10, :10] = True
    crowd[10:, :30] = True
    record = answered((target | crowd)[None], with_ignored(target, crowd))
    assert (record.overlap, record.predicted) == ((100, 100), 100)
    assert record.iou == pytest.approx(1, abs=1e-6)
    alone = answered(crowd[None], with_ignored(target & False, crowd))  # nothing is asked for, and nothing that counts
    assert (alone.overlap, alone.iou, alone.size) == ((0, 0), 1.0, None)


def test_pixellm_an_empty_mask_for_a_query_without_a_target_is_right() -> None:
    nothing = np.zeros((30, 40), dtype=bool)
    for number in (0, 1, 2):
        record = answered(np.zeros((number, 30, 40), dtype=bool), nothing)
        assert (record.overlap, record.iou) == ((0, 0), 1.0)
    wrong = answered(~nothing[None], nothing)
    assert (wrong.overlap, wrong.iou) == ((0, 1200), 0.0)


def test_pixellm_generates_and_matches(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert PixelLM.max_new_tokens == 512
    monkeypatch.setattr(PixelLM, "max_new_tokens", 32)  # random weights never end, nor do they ask for a mask
    found = run(models["pixellm"], "pixellm")["none"]
    answers = [
        models["pixellm"].segment(scene().image, text, answer="generate", max_new_tokens=32, is_sentence=False)
        for text in TEXTS
    ]
    for record, answer, query in zip(found, answers, scene().queries, strict=True):
        (inter, union), iou = matched_overlap(answer.mask_logits, [query.mask])
        assert record.iou == pytest.approx(iou, abs=1e-3)
        assert record.overlap == pytest.approx((inter, union), abs=3)


# metrics -------------------------------------------------------------------------------------------------------------


def test_precision_and_accuracy_of_targets() -> None:
    assert metrics.precision_at([0.5, 0.49, 0.9, 0.0], 0.5) == 0.5
    assert metrics.target_accuracy([True, True, False, False, False], [True, False, True, True, False]) == (
        pytest.approx(2 / 3),
        0.5,
    )
    assert metrics.target_accuracy([True], [False]) == (None, 1.0)
    with pytest.raises(InputError, match="P@X of no expressions"):
        metrics.precision_at([], 0.5)
    target = np.array([[0, 1, 255, 1]], dtype=np.uint8)
    assert metrics.predicted_pixels(np.array([[True, True, True, False]]), target) == 2
