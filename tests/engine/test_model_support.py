"""What several adapters say of one type of models, and adapters that say something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from adapter_plugins import AdapterPlugin, LoadsNothing
from torch import nn

from tokenprune import Adapter, ModelSupport
from tokenprune.engine.interface.checked_model import bound_model_of
from tokenprune.errors import PluginError, UnsupportedError
from tokenprune.loading.model_support import refusal_of, supported_models
from tokenprune.plugins import registry

pytestmark = pytest.mark.usefixtures("fresh_registry")


class Silent(LoadsNothing):
    """Supports its model types, as adapters do by default."""

    model_types = ("tram",)


def saying(*said: Any) -> type[Adapter]:
    class Saying(Silent):
        @classmethod
        def model_support(cls, model_type: str | None = None) -> Any:
            return list(said)

    return Saying


def register(**adapters: Any) -> None:
    registry.register_plugin(AdapterPlugin(**adapters), "ours")


def test_the_adapter_that_supports_a_type_best_decides() -> None:
    refused, limited = ModelSupport("tram", "refused", "no rails"), ModelSupport("bus", "limited", "one way")
    register(first=saying(refused, limited, ModelSupport("car", "refused", "no seats")), second=Silent)
    assert supported_models("tram") == [ModelSupport("tram")]
    assert supported_models("bus") == [limited]
    assert [refusal_of(kind) for kind in ("tram", "bus", "ship", None)] == [None] * 4
    assert "no seats" in (refusal_of("car") or "")


def test_a_live_model_is_refused_with_the_reason() -> None:
    register(first=saying(ModelSupport("car", "refused", "no seats")))
    model = nn.Module()
    model.config = SimpleNamespace(model_type="car")  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match=r"^Module \(model_type 'car'\) is not .*: no seats; .*list --mod"):
        bound_model_of(model)


@pytest.mark.parametrize("said", ["tram", ModelSupport("tram", "works")], ids=str)
def test_an_adapter_that_says_something_else_is_named(said: Any) -> None:
    register(first=saying(said))
    with pytest.raises(PluginError, match=r"'ours'.*'first' returned .*expected a list of ModelSupport"):
        supported_models()
