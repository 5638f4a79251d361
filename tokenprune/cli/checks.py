"""Checks of a command's arguments, above all of names, before anything heavy is imported.

Nothing here imports torch or transformers: a misspelt name is reported at once.
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
    """Check that the model exists, and that its options are valid.

    Raises:
        CheckpointError: not a bundled model, a checkpoint's folder or a model on the hub; no such vision tower.
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
    """Check that strategies of these names are installed, also the parts of "a+b"; options are not checked.

    Raises:
        UnknownNameError: one of them is not.
        PluginError: two packages register it.
    """
    from tokenprune.core.by_name import parts_of

    for name in names:
        parts_of(name)


def strategy_request(
    text: str, options: Iterable[str], budget: float | None
) -> tuple[str, float | None, dict[str, Any]]:
    """Name, budget and options of a strategy, for `tokenprune.strategy`, from the arguments of a command.

    Args:
        text: of --strategy: a name, or a name with options as in `compare`, "csp:query=seg".
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
        raise OptionError(f"strategy {name!r}: budget is not an option here; use --budget")
    for option in within.keys() & given.keys():
        raise OptionError(f"strategy {name!r}: option {option!r} is given twice; give it once")
    if budget is not None and name == "none":
        raise BudgetError(
            f"--budget {budget:g} moves nothing for strategy 'none', which keeps all tokens; name another strategy, as "
            "in --strategy csp"
        )
    return name, budget, {**within, **given}


def check_metrics(names: Iterable[str]) -> None:
    """Check that metrics of these names are installed; errors as in `check_strategies`."""
    from tokenprune.plugins import registry

    for name in names:
        registry.get("metrics", name)


def check_image(image: Path) -> None:
    """Check that an image file exists.

    Raises:
        InputError: it does not, or it is a folder.
    """
    found = expanded(image)
    if found.is_dir():
        raise InputError(f"image {str(image)!r}: a folder, expected an image file; check the path")
    if not found.exists():
        raise InputError(f"image {absent(image)}")


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that the user gave but that would have no effect.

    Args:
        context: of the command.
        names: parameters of the command's function.
        why: the reason, as it follows "has no effect".

    Raises:
        OptionError: one was given.
    """
    for name in names:
        if given(context, name):
            raise OptionError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def given(context: Any, name: str) -> bool:
    """Whether the user gave this parameter, on the command line or through the environment."""
    return context.get_parameter_source(name).name not in ("DEFAULT", "DEFAULT_MAP")
