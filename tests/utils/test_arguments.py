"""Checks of arguments: what they give, and what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenprune.errors import InputError, OptionError
from tokenprune.utils.arguments import instance, listed, one_of, shown, unicode_problem, whole_number


class Unshowable:
    """Raises where it is printed."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("a", "'a'"),
        ("a" * 99, "a str"),
        ("\ud800", "'\\ud800'"),
        (np.zeros((9, 9)), "a ndarray"),
        (object(), "a object"),
        (Unshowable(), "a Unshowable"),
    ],
)
def test_what_messages_show(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers(value: int) -> None:
    found = whole_number("n", value, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [2, True, 3.0, "3", None, np.float64(3), torch.tensor(3), np.array([3])])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(OptionError, match=r"^n: .* found, expected a whole number of at least 3$"):
        whole_number("n", value, 3)


def test_kinds_choices_and_lists() -> None:
    assert instance("n", 3, int, "an int") == 3
    with pytest.raises(InputError, match=r"^n='3' found, expected an int$"):
        instance("n", "3", int, "an int", InputError)
    assert one_of("n", "a", ("a", "b")) == "a"
    with pytest.raises(OptionError, match=r"^n=3 found, expected 'a' or 'b'$"):
        one_of("n", 3, ("a", "b"))
    assert [listed(value) for value in ("ab", b"ab", (1, 2), 3, None)] == [["ab"], [b"ab"], [1, 2], [3], [None]]


def test_texts_that_are_no_unicode() -> None:
    assert unicode_problem("rød 🙂") == ""
    assert unicode_problem("ab\udcff").startswith("holds \\udcff at character 2, ")
