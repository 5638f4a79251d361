"""The names in a new plugin package, all derived from the one name that users type."""

from __future__ import annotations

import builtins
import keyword
import re
from dataclasses import dataclass
from importlib import metadata, util

from tokenprune.errors import InputError, PluginError
from tokenprune.plugins import registry
from tokenprune.plugins.entries import KINDS

PREFIX = "tokenprune-"
LONGEST = 40
SUFFIX = {"strategies": "Strategy", "datasets": "Data"}  # of a class whose name would hide another
GOOD = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """The names in a new package.

    Attributes:
        kind: "strategies", "adapters" or "datasets".
        name: what users type, "my-method".
    """

    kind: str
    name: str

    @property
    def noun(self) -> str:
        """What it is: "strategy", "adapter" or "dataset"."""
        return KINDS[self.kind].noun

    @property
    def distribution(self) -> str:
        """The distribution's name, and its folder: "tokenprune-my-method"."""
        return PREFIX + self.name

    @property
    def identifier(self) -> str:
        """The name in Python: "my_method"."""
        return self.name.replace("-", "_")

    @property
    def module(self) -> str:
        """The import package: "tokenprune_my_method"."""
        return self.distribution.replace("-", "_")

    @property
    def environment(self) -> str:
        """The environment variable with the folder of a dataset's files: "MY_DATA_FOLDER"."""
        return f"{self.identifier.upper()}_FOLDER"

    @property
    def camel(self) -> str:
        """The name as a class name: "MyMethod"."""
        return "".join(part[0].upper() + part[1:] for part in self.name.split("-"))

    def class_name(self, source: str) -> str:
        """The class's name: for an adapter it ends in "Adapter", and it avoids names that `source` uses."""
        if self.kind == "adapters":
            return self.camel + "Adapter"
        used = keyword.iskeyword(self.camel) or hasattr(builtins, self.camel)
        return self.camel + SUFFIX[self.kind] if used or re.search(rf"\b{self.camel}\b", source) else self.camel


def check_name(kind: str, name: str) -> Names:
    """The names of a new package, if `name` is valid and not taken.

    Args:
        kind: "strategies", "adapters" or "datasets".
        name: what the user typed.

    Raises:
        InputError: an invalid name, or one that an installed package uses.
    """
    noun = KINDS[kind].noun
    if not GOOD.fullmatch(name) or len(name) > LONGEST:
        raise InputError(
            f"{name!r} cannot be the name of {_a(noun)}; expected at most {LONGEST} lower-case letters, digits and "
            f"single hyphens between them, beginning with a letter, as in {_better(name)!r}"
        )
    names = Names(kind, name)
    entry = registry.entries(kind).get(name)
    if entry is not None:
        raise InputError(f"the {noun} {name!r} exists already, in package {entry.distribution!r}; choose another name")
    if _installed(names.distribution):
        raise InputError(f"a package {names.distribution!r} is installed already; choose another name, or uninstall it")
    if util.find_spec(names.module) is not None:
        raise InputError(f"a module {names.module!r} is installed already; choose another name")
    if kind == "adapters":
        _check_model_type(names)
    return names


def _check_model_type(names: Names) -> None:
    for entry in registry.adapters().values():
        try:
            known = entry.load().model_types
        except PluginError:
            continue  # an adapter that cannot be imported binds no model either
        if names.identifier in known:
            raise InputError(
                f"models of the type {names.identifier!r} are known already, to the adapter {entry.name!r} of package "
                f"{entry.distribution!r}; choose another name"
            )


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _better(name: str) -> str:
    """A valid name that is similar to this one."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
    found = re.sub(r"[^a-z0-9]+", "-", spaced)[:LONGEST].strip("-")
    return found if GOOD.fullmatch(found) else "my-method"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
