"""The strategy in the arguments of a model, `--model_args pretrained=…,strategy=fastv,budget=0.35,layer=3`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import tokenprune as tp
from tokenprune.core.by_name import parse_options
from tokenprune.evaluation.contenders import Contender


def own_arguments(model: Callable[..., Any]) -> set[str]:
    """The names of the arguments that a model of lmms-eval takes."""
    kinds = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return {name for name, one in signature(model).parameters.items() if one.kind not in kinds}


def contender_of(strategy: Any, budget: Any, options: Mapping[str, Any], own: set[str]) -> Contender:
    """The strategy with its options, and what was given.

    Args:
        strategy: its name.
        budget: None if not given.
        options: of the strategy, as lmms-eval reads them: numbers, True, False, and texts for all else.
        own: the arguments of lmms-eval's model, for the message.

    Raises:
        TokenPruneError: no such strategy or option, or a value that it does not take.
    """
    given = {name: _value(name, value) for name, value in options.items()}
    try:
        return Contender(tp.strategy(strategy, budget, **given), given, budget)
    except tp.TokenPruneError as error:
        raise type(error)(f"model_args: {error}; the model itself takes {', '.join(sorted(own))}") from None


def _value(name: str, value: Any) -> Any:
    """A text as tokenprune's command line reads it: `null` is None."""
    return parse_options([f"{name}={value}"])[name] if isinstance(value, str) else value
