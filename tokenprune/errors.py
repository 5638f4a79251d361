"""Every error a user can cause.

A message is one line that names the thing, what was found, what was expected and what to do; the command line prints
it. All classes take the message as their only argument; the class methods compose it from parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST = 200  # characters of an option's value that a message shows


class TokenPruneError(Exception):
    """Base of all errors raised on purpose by tokenprune.

    Examples:
        >>> import tokenprune as tp
        >>> try:
        ...     tp.strategy("fastv", budget=1.5)
        ... except tp.TokenPruneError as error:
        ...     print(error)
        strategy 'fastv': budget must be a share of the image tokens in (0, 1], got 1.5
    """


class UnknownNameError(TokenPruneError, LookupError):
    """A strategy, adapter, dataset, model, split or other name that is not registered."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Compose the message from the requested and the known names, similar names first.

        Args:
            kind: what the name refers to, in the singular ("strategy").
            name: the requested name.
            known: the names that exist.
        """
        names = list(known)
        near = nearest(name, names)
        hint = f"did you mean {_either(near)}? " if near else ""
        listing = f"known: {', '.join(names)}" if names else f"no {kind} is installed"
        return cls(f"unknown {kind} {name!r}; {hint}{listing}")


class OptionError(TokenPruneError, ValueError):
    """An option that does not exist, or a value that it cannot take."""

    @classmethod
    def from_validation(cls, thing: str, error: Exception, known: Iterable[str] = ()) -> OptionError:
        """Turn a pydantic ValidationError into one line.

        Args:
            thing: what the options belong to ("strategy 'fastv'").
            error: a pydantic ValidationError; any object with its method `errors()`.
            known: names of the options that exist, used to suggest one.
        """
        names = list(known)
        found: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
        return cls(f"{thing}: " + "; ".join(_option_problem(item, names) for item in _merged(found)))


class BudgetError(OptionError):
    """A budget outside (0, 1], or one that the strategy cannot meet."""


class InputError(TokenPruneError, ValueError):
    """An image, query, prompt, mask or tensor that cannot be used."""


class CheckpointError(TokenPruneError):
    """A checkpoint that is missing, damaged, or not what the adapter expects."""


class PluginError(TokenPruneError):
    """A plugin that cannot be imported, registers something invalid, or misbehaves while it runs.

    Attributes:
        plugin: its name; empty if the message names a strategy or another entry instead.
    """

    plugin = ""

    @classmethod
    def of(cls, plugin: str, distribution: str, problem: str, advice: str = "") -> PluginError:
        """Compose the message; `plugin` is its name, `distribution` its package."""
        error = cls(f"plugin {plugin!r} of package {distribution!r}: {problem}" + (f"; {advice}" if advice else ""))
        error.plugin = plugin
        return error


class PluginWarning(UserWarning):
    """A plugin that works but does something that it should not, for example keeps tensors after the prefill."""


class IncompatibleError(TokenPruneError):
    """A strategy requires reads that the model does not provide."""


class UnsupportedError(TokenPruneError):
    """Something that tokenprune does not support (for example nested contexts)."""


class BusyError(UnsupportedError):
    """Another thread is using the model, and the caller does not want to wait."""


class DataWarning(UserWarning):
    """Files of a dataset that are missing or damaged, and left out as its options allow."""


class PruningWarning(UserWarning):
    """A correct result without pruning, for example of an image in a later turn of a conversation."""


class EngineError(TokenPruneError):
    """The engine cannot run a schedule, or a strategy answered a stage with something invalid."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Names in `known` that are similar to `name`, best first, ignoring case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.6)]


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """pydantic reports an error for each type of a union; this merges them into one per value."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for item in found:
        *before, last = item["loc"] or ("options",)
        kind = isinstance(last, str) and bool(before) and item["type"] not in ("extra_forbidden", "missing")
        groups.setdefault(tuple(before) if kind else (*before, last), []).append(item)
    merged = []
    for loc, items in groups.items():
        if len(items) == 1 or any(item.get("input") is not items[0].get("input") for item in items):
            merged += items
            continue
        messages = [item["msg"].partition(", unable")[0].removeprefix("Input should be ") for item in items]
        merged.append({**items[0], "loc": loc, "msg": f"Input should be {' or '.join(dict.fromkeys(messages))}"})
    return merged


def _option_problem(item: dict[str, Any], known: list[str]) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "options"
    if item["type"] == "extra_forbidden":
        near = nearest(path.rsplit(".", 1)[-1], known)
        hint = f"; did you mean {_either(near)}?" if near else ""
        return f"unknown option {path!r}{hint}" + (f" (options: {', '.join(known)})" if known else "")
    expected = str(item["msg"])
    expected = expected[:1].lower() + expected[1:]
    if item["type"] == "missing":
        return f"option {path!r} is missing; give it a value"
    given = " ".join(repr(item.get("input")).split())
    given = given if len(given) <= LONGEST else f"{given[:LONGEST]} …"
    return f"option {path!r}: found {given}, but {expected}"
