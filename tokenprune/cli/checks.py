"""What can be known to be wrong with a request before anything heavy is imported: names, above all.

Nothing here imports torch or transformers, so that a misspelt name is told at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import BudgetError, CheckpointError, InputError, OptionError
from tokenprune.utils.files import absent, expanded

if TYPE_CHECKING:
    import typer


def check_model(
    model: str, *, vision_tower: Path | None = None, dtype: str | None = None, device: str | None = None
) -> None:
    """See that there is such a model, and that its options can be meant.

    Raises:
        CheckpointError: neither a bundled model nor a checkpoint's folder nor on the hub; no such vision tower.
        OptionError: an unknown device or number format.
    """
    from tokenprune.loading.checkpoints import find_checkpoint, is_hub_id
    from tokenprune.loading.device_names import check_device, check_dtype

    if device is not None:
        check_device(device)
    if dtype is not None:
        check_dtype(dtype)
    if vision_tower is not None:
        tower = expanded(vision_tower)
        if not tower.is_dir() and not (is_hub_id(str(vision_tower)) and not tower.exists()):
            found = "is a file, expected the folder that holds it" if tower.exists() else "no such folder"
            raise CheckpointError(f"vision tower {str(vision_tower)!r}: {found}; check --vision-tower")
    find_checkpoint(model)


def check_strategies(names: Iterable[str]) -> None:
    """See that strategies of these names are installed, parts of "a+b" included; options are not looked at.

    Raises:
        UnknownNameError: one is not.
        PluginError: two packages register it.
    """
    from tokenprune.core.by_name import parts_of

    for name in names:
        parts_of(name)


def strategy_request(
    text: str, options: Iterable[str], budget: float | None
) -> tuple[str, float | None, dict[str, Any]]:
    """Name, budget and options of a strategy, as `tokenprune.strategy` takes them, from what a command is given.

    Args:
        text: of --strategy: a name, or one with options as `compare` takes it, "csp:query=seg".
        options: of -o, "key=value" each.
        budget: of --budget.

    Raises:
        OptionError: an option that cannot be read, is given twice, or is a budget.
        BudgetError: a budget for `none`, which is the default.
        UnknownNameError, PluginError: see `check_strategies`.
    """
    from tokenprune.core.by_name import parse_options, parse_text

    name, within = parse_text(text)
    check_strategies([name])
    given = parse_options(options)
    if "budget" in within or "budget" in given:
        raise OptionError(f"strategy {name!r}: budget is no option of its own here; give --budget")
    for option in within.keys() & given.keys():
        raise OptionError(f"strategy {name!r}: option {option!r} is given twice; give it once")
    if budget is not None and name == "none":
        raise BudgetError(
            f"--budget {budget:g} moves nothing for strategy 'none', which keeps all tokens; name another strategy, as "
            "in --strategy csp"
        )
    return name, budget, {**within, **given}


def check_metrics(names: Iterable[str]) -> None:
    """See that metrics of these names are installed; errors as in `check_strategies`."""
    from tokenprune.plugins import registry

    for name in names:
        registry.get("metrics", name)


def check_image(image: Path) -> None:
    """See that an image file is there.

    Raises:
        InputError: it is not, or it is a folder.
    """
    found = expanded(image)
    if found.is_dir():
        raise InputError(f"image {str(image)!r}: a folder, expected an image file; check the path")
    if not found.exists():
        raise InputError(f"image {absent(image)}")


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that the user gave and that would have no effect.

    Args:
        context: of the command.
        names: parameters of the command's function.
        why: they have none, as it follows "has no effect".

    Raises:
        OptionError: one was given.
    """
    for name in names:
        if given(context, name):
            raise OptionError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def given(context: Any, name: str) -> bool:
    """Whether the user gave this parameter, on the command line or through the environment."""
    return context.get_parameter_source(name).name not in ("DEFAULT", "DEFAULT_MAP")
