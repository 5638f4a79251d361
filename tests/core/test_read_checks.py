"""Values that are not finite: no strategy chooses by them, whichever read they are in; padding may hold anything."""

from __future__ import annotations

import re
from math import inf, nan
from typing import Any

import pytest
import torch
from strategy_bench import Bench
from torch import Tensor

import tokenprune as tp
from tokenprune.core.reads import Read
from tokenprune.core.scheduling.read_checks import OF_TEXT
from tokenprune.errors import InputError
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, entry in registry.strategies().items() if entry.distribution == "tokenprune-vlm"),
    ("csp", {"clustering": "kmeans"}),
    ("csp", {"clustering": "cls_attention", "reentry": "delta"}),
    ("vscan", {"variant": "qwen"}),
]
WITHOUT_READS = {"none", "blind", "random", "uniform"}


class Spoilt(Bench):
    """A bench one of whose reads has wrong values in row 0; `seen` are the reads of floats so far."""

    def __init__(self, name: str, options: dict[str, Any], wrong: float = nan, field: str = "") -> None:
        budget = {"budget": 0.5} if name not in ("none", "blind") else {}
        super().__init__(tp.strategy(name, **budget, **options), [[36], [16]])
        self.wrong, self.field, self.seen = wrong, field, dict[str, Read]()

    def provide(self, read: Read) -> Any:
        value = super().provide(read)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self.seen[read.field] = read
        if read.field == self.field:
            value = value.clone()
            value[0] = self.wrong
        return value


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[f"{name} {options or ''}" for name, options in OPTIONS])
def test_no_strategy_chooses_by_values_that_are_no_numbers(name: str, options: dict[str, Any]) -> None:
    seen = Spoilt(name, options).run().seen  # type: ignore[attr-defined] # run returns the bench
    assert bool(seen) == (name not in WITHOUT_READS)
    for field, read in seen.items():
        kind = "text" if isinstance(read, OF_TEXT) else "image"
        for wrong in (nan,) if read.infinite else (nan, inf):
            where = rf"at {kind} token \d+ of batch row 0"
            found = rf"'{re.escape(name)}', stage '.*': NaN.* in tokens\.{field} \({read}\), {where}"
            with pytest.raises(InputError, match=found):
                Spoilt(name, options, wrong, field).run()


@pytest.mark.parametrize(("name", "field"), [("divprune", "hidden"), ("vispruner", "features"), ("tome", "layer_keys")])
def test_padding_may_hold_anything(name: str, field: str) -> None:
    class Padded(Spoilt):
        def provide(self, read: Read) -> Any:
            value = super().provide(read)
            if read.field == field:
                value = value.clone()
                value[1, 16:] = nan  # row 1 has 16 tokens
            return value

    kept = [stage.kept for stage in Spoilt(name, {}).run().trace.stages]
    assert [stage.kept for stage in Padded(name, {}).run().trace.stages] == kept


def test_in_a_composition_too() -> None:
    bench = Bench(tp.strategy("uniform+divprune", budget=0.5), [[36]])
    states = bench.states.clone()
    states[0, 2] = nan
    bench.given["hidden"] = states
    with pytest.raises(InputError, match=r"stage '.*divprune/select': NaN or infinity in tokens\.hidden"):
        bench.run()


def test_states_of_a_model_that_overflow() -> None:
    embeds, image_tokens = torch.randn(1, 24, 32), torch.zeros(1, 24, dtype=torch.bool)
    image_tokens[:, 4:20] = True
    embeds[0, 9] = inf
    with (
        pytest.raises(InputError, match=r"'divprune'.* tokens\.hidden .*image token 5 of batch row 0.*float16"),
        torch.no_grad(),
        tp.prune(model := tiny_llama(2), tp.strategy("divprune", keep=4), image_tokens=image_tokens),
    ):
        model(inputs_embeds=embeds)
