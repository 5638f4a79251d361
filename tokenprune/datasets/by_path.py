"""A dataset by the location of its class, "module:Class", without a package that registers it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenprune.datasets.base import Dataset
from tokenprune.errors import PluginError, UnknownNameError
from tokenprune.plugins.attribution import blamed


def dataset_at(place: str) -> Dataset:
    """The dataset whose class is at "module:Class".

    The module is imported from the usual path, then from the current folder. The class is instantiated without
    arguments.

    Args:
        place: "my_module:MyData" or "my_package.my_module:MyData".

    Raises:
        UnknownNameError: not of this form, or no such module or class.
        PluginError: the module cannot be imported, or the class is not a dataset or cannot be instantiated.
    """
    module, _, name = place.partition(":")
    if module.endswith(".py") or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        hint = ""
        if module.endswith(".py"):
            hint = f"; drop .py: {module.removesuffix('.py').strip('./').replace('/', '.')}:{name}"
        raise UnknownNameError(
            f"dataset {place!r} found, expected a registered name or module:Class, as in my_data:MyData{hint}"
        )
    found = _imported(place, module)
    kind = getattr(found, name, None)
    if kind is None:
        raise UnknownNameError.among(f"dataset of module {module!r} ({_home(found)})", name, _classes(found))
    if not (isinstance(kind, type) and issubclass(kind, Dataset)):
        raise _refusal(place, f"is {kind!r}, expected a subclass of tokenprune.datasets.base.Dataset")
    with blamed(lambda said: _refusal(place, f"cannot be made without arguments: {said}")):
        data = kind()
    if not isinstance(getattr(data, "name", None), str):
        raise _refusal(place, "has no name; give the class a name, which reports call it by")
    return data


def refuse_dotted(name: str) -> None:
    """Raises UnknownNameError with a hint for a location without the colon: "my_module.MyData"."""
    module, dot, kind = name.rpartition(".")
    if kind == "py":
        raise UnknownNameError(f"dataset {name!r} is a file; name its class, as in {Path(name).stem}:MyData")
    if dot and all(part.isidentifier() for part in name.split(".")):
        raise UnknownNameError(f"unknown dataset {name!r}; did you mean '{module}:{kind}', module:Class?")


def _imported(place: str, module: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be new
    try:
        with _current_folder(), blamed(lambda said: _refusal(place, f"its module cannot be imported: {said}")):
            return importlib.import_module(module)
    except PluginError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            where = f"neither installed nor in the current folder {_folder()!r}"
            raise UnknownNameError(
                f"dataset {place!r}: no module {cause.name!r} is there, {where}; check the name"
            ) from cause
        raise


@contextmanager
def _current_folder() -> Iterator[None]:
    """Add the current folder to the end of the import path, after everything that is installed."""
    folder = _folder()
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return "."


def _home(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def _classes(module: ModuleType) -> list[str]:
    def is_data(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, Dataset) and not inspect.isabstract(value)

    return [name for name, value in vars(module).items() if is_data(value)]


def _refusal(place: str, problem: str) -> PluginError:
    return PluginError(f"dataset {place!r} {problem}")
