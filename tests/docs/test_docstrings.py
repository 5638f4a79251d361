"""Docstrings of the public names: each has an example, and the examples do what they show."""

from __future__ import annotations

import doctest
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

import tokenprune

WITHOUT = {"Decision"}  # the base of Keep, Restore and Merge, which is not answered itself


def public(name: str) -> tuple[Any, ModuleType]:
    """A public object, and the module that defines it."""
    home = importlib.import_module(tokenprune._MODULE_OF[name])
    value = getattr(home, name)  # not that of `tokenprune`: the package `tokenprune.datasets` hides the function
    return value, inspect.getmodule(value) if inspect.isroutine(value) or inspect.isclass(value) else home


MODULES = {module.__name__: module for module in (public(name)[1] for name in tokenprune.__all__)}


@pytest.mark.parametrize("name", sorted(set(tokenprune.__all__) - WITHOUT))
def test_every_public_name_has_an_example(name: str) -> None:
    """Its own, or, of a family of names, that of their module."""
    value, module = public(name)
    assert ">>> " in f"{value.__doc__}{module.__doc__}"


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_examples_do_what_they_show(module: ModuleType) -> None:
    """Of every docstring in the modules that define public names."""
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
