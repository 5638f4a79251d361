"""Text that names strategies: several joined by "+", and options as in "csp:query=seg,keep=0.5"."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from tokenprune.errors import OptionError
from tokenprune.plugins import registry

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy
    from tokenprune.plugins.entries import Entry


def made(entry: Entry, budget: float | None = None, **options: Any) -> Strategy:
    """A registered strategy with these options; errors as in `tokenprune.strategy`."""
    kind = entry.load()
    with entry.running():
        found: Strategy = kind(budget=budget, **options)
        check_effects(found)
    return found


def check_effects(strategy: Strategy) -> None:
    """Raise OptionError if an option that was given changes nothing, given the others."""
    for option, why in strategy.without_effect().items():
        if option in strategy.options.model_fields_set:
            raise OptionError(f"strategy {strategy.name!r}: option {option!r} has no effect {why}; leave it out")


def parts_of(name: str) -> list[Entry]:
    """The strategies of a name: one, or those joined by "+"; none is imported.

    Raises:
        UnknownNameError: no such strategy.
        PluginError: two packages register it.
    """
    known = registry.strategies()
    name = re.sub(r"\s*\+\s*", "+", name.strip())
    joined = name not in known and "+" in name
    names = (names_in(name, known) or name.split("+")) if joined else [name]
    return [registry.get("strategies", part) for part in names]


def names_in(text: str, known: Collection[str]) -> list[str] | None:
    """The registered names that "a+b" joins, where names may contain a "+" themselves; None if there are none."""
    if text in known:
        return [text]
    for name in sorted(known, key=len, reverse=True):
        if text.startswith(name + "+"):
            rest = names_in(text[len(name) + 1 :], known)
            if rest is not None:
                return [name, *rest]
    return None


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Options by name from `key=value` texts.

    A value that is JSON (a number, true, false, null, a list, a quoted string) is read as such, any other is a string,
    so that `layer=3`, `keep=0.25`, `clustering=kmeans` and `segmenter=null` mean what they look like.

    Raises:
        OptionError: no `=`, an empty key, or a key given twice.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise OptionError(f"option {text!r} found, expected key=value, as in keep=0.5")
        if key in options:
            raise OptionError(f"option {key!r} is given twice; give it once")
        options[key] = _value(value.strip())
    return options


def split_list(text: str) -> list[str]:
    """A comma-separated list of strategies, whose options are separated by commas too.

    "none,csp:query=seg,reentry=delta,fastv" is none, csp:query=seg,reentry=delta and fastv: a part with "=" but no name
    of its own belongs to the strategy before it.

    Raises:
        OptionError: an empty part, or options before any strategy.
    """
    found: list[str] = []
    for part in (piece.strip() for piece in split_at_commas(text)):
        if not part:
            raise OptionError(f"strategies: an empty name found in {text!r}, expected names separated by commas")
        is_option = "=" in part and ":" not in part.split("=", 1)[0]
        if not is_option:
            found.append(part)
        elif not found:
            raise OptionError(f"strategies: option {part!r} found before any strategy; write name:{part}")
        else:
            found[-1] += ("," if ":" in found[-1] else ":") + part
    return found


def split_at_commas(text: str) -> list[str]:
    """The parts between commas, but for commas inside of brackets or double quotes, which belong to a value."""
    parts, depth = [""], 0
    for piece in re.findall(r'"(?:\\.|[^"\\])*"|.', text, re.DOTALL):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def parse_text(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options, `budget` included, of "name:key=value,key=value"; values as `parse_options` reads them.

    Raises:
        OptionError: a part that is not key=value, or a key given twice.
    """
    name, _, rest = text.partition(":")
    try:
        return name.strip(), parse_options(part.strip() for part in split_at_commas(rest) if part.strip())
    except OptionError as error:
        raise OptionError(f"strategy {name.strip()!r}: {error}") from error


def _value(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
