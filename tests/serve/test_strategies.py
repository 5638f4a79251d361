"""Which strategies a request may name, and with which options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_segmentation import FakeModel, FakePlugin

import tokenprune as tp
from tokenprune.errors import BudgetError, IncompatibleError, OptionError, UnknownNameError
from tokenprune.plugins import registry
from tokenprune.serve.strategies import Choices, _is_plain
from tokenprune.serve.work import check_work

CHOICES = Choices("fastv", 0.5, layer=1)


def test_equal_requests_get_one_object() -> None:
    assert CHOICES.of("csp:query=seg", 0.35) is CHOICES.of("csp:query=seg", 0.35)
    assert CHOICES.of("csp:query=seg", 0.35) is not CHOICES.of("csp", 0.35)


@pytest.mark.parametrize(
    ("text", "budget", "expected"),
    [
        (None, None, "FastV(budget=0.5, layer=1)"),
        (None, 0.25, "FastV(budget=0.25, layer=1)"),
        ("fastv", None, "FastV()"),
        ("none", None, "NoPruning()"),
        ("csp:query=seg,keep=0.1", 0.35, "CSP(budget=0.35, keep=0.1, query='seg')"),
        ("uniform + fastv", 0.35, "Sequence(Uniform(), FastV(), budget=0.35)"),
        ("fastv:layer=3", None, "FastV(layer=3)"),
    ],
)
def test_what_a_request_gets(text: str | None, budget: float | None, expected: str) -> None:
    assert repr(CHOICES.of(text, budget)) == expected


REFUSED = [
    ("fastvv", None, UnknownNameError, "did you mean 'fastv'"),
    ("os:system", None, OptionError, "'system' found, expected key=value"),
    ("tokenprune_strategies.fastv:FastV", None, OptionError, "expected key=value"),
    ("/etc/passwd", None, UnknownNameError, "unknown strategy"),
    ("csp:clustering=seg_first,segmenter=/etc/passwd", None, OptionError, "cannot set option 'segmenter'"),
    ("csp:clustering=seg_first,segmenter=os:system", None, OptionError, "cannot set option 'segmenter'"),
    ("csp:clustering=seg_first,segmenter=null", None, OptionError, "cannot set option 'segmenter'"),
    ("csp:query=/etc/passwd", None, OptionError, "no name of query rows"),
    ("csp:query=../weights", None, OptionError, "no name of query rows"),
    ("uniform+fastv:parts=[]", None, OptionError, "options of a composition"),
    ("fastv:budget=0.5", None, OptionError, "budget is not an option here"),
    ("fastv:layr=1", None, OptionError, "did you mean 'layer'"),
    ("fastv:keep=NaN", None, OptionError, "keep"),
    ("fastv:keep=1e999", None, OptionError, "keep"),
    ("+".join(["uniform"] * 5000), None, OptionError, "39999 characters"),
    ("", None, UnknownNameError, "unknown strategy"),
    ("none", 0.5, BudgetError, "moves nothing"),
    ("fastv", float("nan"), BudgetError, "(0, 1]"),
    ("fastv", -0.5, BudgetError, "(0, 1]"),
    (None, 7.0, BudgetError, "(0, 1]"),
]


@pytest.mark.parametrize(("text", "budget", "error", "part"), REFUSED)
def test_what_a_request_may_not_name(
    text: str | None, budget: float | None, error: type[tp.TokenPruneError], part: str
) -> None:
    with pytest.raises(error) as caught:
        CHOICES.of(text, budget)
    assert part in str(caught.value)


def test_a_plugins_free_text_is_refused(tmp_path: Path) -> None:
    """`front` has an option `note` of type str, which might as well be a file's name."""
    registry.register_plugin(FakePlugin(tmp_path), "fakes")
    try:
        assert repr(CHOICES.of("front:layer=2", None)) == "Front(layer=2)"
        with pytest.raises(OptionError, match="cannot set option 'note'"):
            CHOICES.of("front:note=weights", None)
    finally:
        registry.unregister_plugin("fakes")


def test_the_options_of_built_in_methods_are_plain_but_for_two() -> None:
    found = {
        (name, option)
        for name, entry in tp.strategies().items()
        if entry.distribution == "tokenprune-vlm"
        for option, field in entry.load().Options.model_fields.items()
        if not _is_plain(field.annotation)
    }
    assert {option for _, option in found} == {"query", "segmenter"}


class Word(Enum):
    one = "one"


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (int, True),
        (float | None, True),
        (tuple[int | float, ...], True),
        (Literal["a", "b"], True),
        (Word, True),
        (str, False),
        (str | None, False),
        (Path, False),
        (Any, False),
        (dict[str, int], False),
        (tuple[str, int], False),
    ],
)
def test_kinds_of_options(kind: Any, plain: bool) -> None:
    assert _is_plain(kind) is plain


def test_the_servers_own_strategy_has_to_run_on_the_model() -> None:
    model: Any = tp.load("lisa-tiny")
    check_work(model, CHOICES.default)
    check_work(FakeModel(), CHOICES.default)
    with pytest.raises(OptionError, match="99"):
        check_work(model, Choices("fastv", layer=99).default)
    with pytest.raises(IncompatibleError, match="cdpruner"):
        check_work(FakeModel(), Choices("cdpruner").default)


def test_without_choices_nothing_is_pruned() -> None:
    assert repr(Choices().of(None, None)) == "NoPruning()"
    with pytest.raises(BudgetError, match="moves nothing"):
        Choices().of(None, 0.5)
