"""Which types of models the installed adapters support, and why they refuse others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.plugins import registry
from tokenprune.plugins.entries import Entry
from tokenprune.utils.arguments import shown

STATUSES = ("supported", "limited", "refused")


@dataclass(frozen=True)
class ModelSupport:
    """What an adapter says of one type of models.

    Attributes:
        model_type: as in config.json.
        status: "supported", "limited" (the reason names what does not work), or "refused".
        reason: a short sentence without a full stop; empty for "supported".

    Example:
        >>> ModelSupport("mllama", "refused", "its text layers read the image by cross-attention").status
        'refused'
    """

    model_type: str
    status: str = "supported"
    reason: str = ""


def supported_models(model_type: str | None = None) -> list[ModelSupport]:
    """What the installed adapters say of the types of models, sorted by type.

    If several adapters know a type, the one that supports it best decides.

    Args:
        model_type: the only type that is asked for; None = all.

    Raises:
        PluginError: an adapter cannot be imported, raises, or returns something else; names the adapter.
    """
    found: dict[str, ModelSupport] = {}
    for entry in registry.adapters().values():
        for one in _said_by(entry, model_type):
            other = found.get(one.model_type)
            if other is None or STATUSES.index(one.status) < STATUSES.index(other.status):
                found[one.model_type] = one
    return [found[kind] for kind in sorted(found)]


def _said_by(entry: Entry, model_type: str | None) -> list[ModelSupport]:
    said: Any = entry.call(model_type, method="model_support")
    if not isinstance(said, (list, tuple)) or not all(
        isinstance(one, ModelSupport) and one.status in STATUSES for one in said
    ):
        raise entry.refusal(
            f"returned {shown(said)} from model_support(), expected a list of ModelSupport, each with the status "
            f"{' or '.join(STATUSES)}",
            "fix or uninstall it",
        )
    return [one for one in said if model_type in (None, one.model_type)]


def refusal_of(model_type: Any) -> str | None:
    """Why the installed adapters refuse a type of models, to be put behind the model's name; None if they do not.

    Raises:
        PluginError: see `supported_models`.
    """
    if not isinstance(model_type, str):
        return None
    for one in supported_models(model_type):
        if one.status == "refused":
            return (
                f"(model_type {model_type!r}) is not supported: {one.reason}; `tokenprune list --models` lists the "
                "models that are"
            )
    return None
