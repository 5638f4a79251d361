"""`strategy` and `load`: from a name to an object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.core.by_name import check_effects, made, parts_of
from tokenprune.errors import CheckpointError
from tokenprune.loading.checkpoints import find_checkpoint
from tokenprune.loading.lora_folders import ADAPTER_CONFIG, MERGE, base_of
from tokenprune.loading.model_support import refusal_of
from tokenprune.plugins import registry
from tokenprune.plugins.entries import not_loaded
from tokenprune.utils.arguments import instance
from tokenprune.utils.files import expanded

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy

__all__ = ["load", "strategy"]


def strategy(name: str, budget: float | None = None, **options: Any) -> Strategy:
    """A strategy by name.

    Args:
        name: a name of `tokenprune.strategies()`, or several joined by "+", which run one after the other (see
            `tokenprune.Sequence`; its options are `budgets` and `parts`). A registered name may contain a "+".
        budget: equivalent image tokens as a fraction of all image tokens, in (0, 1]; solved for when the strategy runs.
        options: fields of the strategy's `Options`.

    Raises:
        UnknownNameError: no such strategy.
        OptionError: no name, an unknown option, a value out of range, or an option that would have no effect.
        BudgetError: a budget out of range, or for a strategy without an option that it could move.
        PluginError: the strategy's module cannot be imported, or its class cannot be instantiated.

    Examples:
        >>> import tokenprune as tp
        >>> tp.strategy("fastv", layer=3, budget=0.35)
        FastV(budget=0.35, layer=3)
        >>> tp.strategy("uniform+fastv")
        Sequence(Uniform(), FastV())
    """
    parts = parts_of(instance("name", name, str, "the name of a strategy, such as 'csp'"))
    if len(parts) > 1:
        from tokenprune.core.composition.sequence import Sequence  # imports torch

        joined = Sequence(*(part.name for part in parts), budget=budget, **options)
        for part in joined.parts:
            check_effects(part)
        return joined
    return made(parts[0], budget, **options)


def load(name_or_path: str | Path, **options: Any) -> Any:
    """Load a model by name, folder or hub id.

    Args:
        name_or_path: a bundled model (`tokenprune list` shows them), a checkpoint folder, or a hub id.
        options: passed to the adapter: `dtype`, `device`, `device_map`, `vision_tower`, …

    Raises:
        OptionError: no name, or an option that is unknown to the family or of another type.
        CheckpointError: there is no such checkpoint, or no adapter supports its kind.
        PluginError: an adapter cannot be imported, or raises an unexpected exception; a bundled model's folder
            does not exist.

    Examples:
        >>> import numpy, tokenprune as tp
        >>> model = tp.load("lisa-tiny")
        >>> image = numpy.zeros((128, 128, 3), dtype=numpy.uint8)
        >>> model.segment(image, "the red ring", tp.strategy("csp", budget=0.35)).masks.shape
        torch.Size([1, 128, 128])
    """
    source, config = find_checkpoint(name_or_path)
    adapters = registry.adapters()
    for entry in adapters.values():
        if entry.call(source, config, method="matches"):
            kind = entry.load()
            if not getattr(kind, "merges_lora", False) and base_of(expanded(source)) is not None:
                raise CheckpointError(
                    f"{source} holds an unmerged adapter ({ADAPTER_CONFIG}), which {entry.name!r} does not merge; "
                    f"{MERGE}"
                )
            from tokenprune.utils.torch_state import loading  # imports torch

            with entry.running("load"), loading():
                model = kind.load(source, **options)
            if model is None:
                raise entry.refusal("gave None in load(), expected the model")
            if str(name_or_path) in registry.models() and hasattr(model, "name"):
                model.name = str(name_or_path)  # the name in reports: not the folder
            return model
    refused = refusal_of(config.get("model_type"))
    if refused:
        raise CheckpointError(f"{source} {refused}")
    found = f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}"
    known = f"{', '.join(adapters) or 'none'}{not_loaded(registry.broken_plugins())}"
    raise CheckpointError(f"{source}: no adapter knows this checkpoint; found {found}; installed adapters: {known}")
