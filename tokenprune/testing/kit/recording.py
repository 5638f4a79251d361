"""Runs a strategy on a case, and records everything that happens."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.core.decisions import Decision
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.core.trace import Trace
from tokenprune.engine import prune
from tokenprune.engine.calls.interception import shadowed
from tokenprune.testing.kit.cases import Case, SyntheticBatch
from tokenprune.testing.kit.decoder_families import FAMILIES, WIDTH, model_of, stack_of
from tokenprune.testing.kit.synthetic_vision import synthetic_vision_of
from tokenprune.testing.scripted import Scripted, Step

_WATCHED = ("exists", "active", "parked", "mass", "origin", "lineage", "counts", "target")
_WATCHED_PLACES = ("image", "grid", "places", "text", "text_places", "images_before")


@dataclass
class Log:
    """The record of a run.

    Attributes:
        steps: the decisions, in order, with the position policy of their stages.
        written: names of tensors that the strategy modified, with the stage at which that was detected.
        entered: per layer, [batch, M, width]: its input states.
        tables: per layer, [batch, M, C]: its rotary tables.
        left: per layer, [batch, M, width]: its output.
        open: whether layers are recorded; not while decoding.
    """

    steps: list[Step] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    open: bool = True
    _watched: list[tuple[str, weakref.ref[Tensor], Tensor]] = field(default_factory=list)

    def watch(self, name: str, value: Any) -> None:
        """Store the current values of a tensor, or of a tuple of tensors."""
        if isinstance(value, tuple):
            for part in value:
                self.watch(name, part)
        elif isinstance(value, Tensor):
            self._watched.append((name, weakref.ref(value), value.clone()))

    def look(self, where: str) -> None:
        """Compare all watched tensors with their stored values."""
        for name, reference, held in self._watched:
            value = reference()  # None: the tensor is gone
            if value is None:
                continue
            same = value.shape == held.shape and torch.equal(value.nan_to_num(), held.nan_to_num())
            if not same and not any(line.startswith(f"{name} ") for line in self.written):
                self.written.append(f"{name} (noticed {where})")


@dataclass
class Run:
    """A finished run: the prompt's final states [batch, S, width], the trace, the log, and what it ran on."""

    made: SyntheticBatch
    output: Tensor
    trace: Trace
    log: Log
    decoded: Tensor
    context: Any

    def script(self, strategy: Strategy) -> Scripted:
        """The same decisions, to be replayed."""
        return Scripted(self.log.steps, positions=strategy.positions)


class Watched(Strategy):
    """A strategy whose every choice goes into a log."""

    def __init__(self, inner: Strategy, log: Log) -> None:
        self.inner, self.log = inner, log
        self.name, self.positions, self.budget, self.options = inner.name, inner.positions, inner.budget, inner.options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """See the strategy."""
        return self.inner.stages(shape)

    def bind(self, shape: Shape) -> Watched:
        """The bound strategy, recorded."""
        return Watched(self.inner.bind(shape), self.log)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """The strategy's choice, after a check of all watched tensors."""
        provide = tokens._provide

        def watched(read: Any) -> Any:
            value = provide(read)
            self.log.watch(f"tokens.{read.field}", value)
            return value

        tokens._provide = watched
        for name in (*_WATCHED, *_WATCHED_PLACES):
            self.log.watch(f"tokens.{name}", getattr(tokens, name))
        decision = self.inner.choose(stage, tokens)
        self.log.look(f"in stage {stage.name!r}")
        policy: Positions = stage.positions or self.inner.positions
        shorter = stage.prune_earlier_caches, stage.caches_from
        self.log.steps.append(Step(stage.layer, _without_scores(decision), policy, tokens.exists.any(1), *shorter))
        return decision

    def __repr__(self) -> str:
        return repr(self.inner)


def _without_scores(decision: Any) -> Any:
    """A copy of a decision that shares no tensor with the strategy's inputs; other values are unchanged."""
    return replace(decision, scores=None) if isinstance(decision, Decision) else decision


class Break(BaseException):
    """Raised inside a run; not an Exception, so that it is not converted to another error."""


class Breaking(Strategy):
    """A strategy whose n-th choice raises."""

    def __init__(self, inner: Strategy, number: int, left: list[int] | None = None) -> None:
        self.inner, self.number, self.left = inner, number, left or [number]
        self.name, self.positions, self.budget, self.options = inner.name, inner.positions, inner.budget, inner.options

    def stages(self, shape: Shape) -> Iterable[Stage]:
        """See the strategy."""
        return self.inner.stages(shape)

    def bind(self, shape: Shape) -> Breaking:
        """The bound strategy, which raises too."""
        ready = self.inner if self.budget is None else with_budget(self.inner, self.budget)
        return Breaking(ready.bind(shape), self.number, self.left)

    def choose(self, stage: Stage, tokens: Tokens) -> Decision:
        """The strategy's choice, or the exception."""
        if self.left[0] == 0:
            raise Break
        self.left[0] -= 1
        return self.inner.choose(stage, tokens)


def with_budget(strategy: Strategy, budget: float | None) -> Strategy:
    """A copy of a strategy with that budget; the strategy itself for None."""
    if budget is None:
        return strategy
    made = copy.copy(strategy)
    made.budget = budget
    return made


@torch.no_grad()
def run(case: Case, strategy: Strategy, *, new: int = 0, seed: int = 0, noise: int | None = None) -> Run:
    """The prefill of a case under a strategy, then `new` tokens decoded one by one on its cache.

    Args:
        case: what it runs on.
        strategy: that chooses.
        new: tokens to decode.
        seed: of the run.
        noise: seed of a rounding error on everything that the strategy may read; None = none.
    """
    family, model = FAMILIES[case.family], model_of(case.family)
    made = SyntheticBatch(case.rows, case.padding, new=new)
    prompt, length = SyntheticBatch(case.rows, case.padding), made.length
    embeds, ids, mask = made.embeds(WIDTH), family.positions(made), made.mask
    vision = synthetic_vision_of(prompt, WIDTH)
    if noise is not None:
        embeds = rounded(embeds, noise)
        vision = replace(vision, answers={kind: _rounding(give, noise) for kind, give in vision.answers.items()})
    log = Log()
    log.watch("inputs_embeds", embeds)
    log.watch("image_tokens", prompt.layout.image_tokens)
    log.watch("grid", prompt.grid)
    watched = Watched(with_budget(strategy, case.budget), log)
    stack = stack_of(model)
    with ExitStack() as undo:
        undo.enter_context(_logged(stack, log))
        context = undo.enter_context(
            prune(
                model,
                watched,
                image_tokens=prompt.layout.image_tokens,
                grid=prompt.grid,
                image_number=prompt.number,
                vision=vision,
                seed=seed,
                strict=True,
            )
        )
        first = stack(
            inputs_embeds=embeds[:, :length],
            attention_mask=None if mask is None else mask[:, :length],
            position_ids=ids[..., :length],
            use_cache=new > 0,
        )
        log.open = False
        decoded = [
            stack(
                inputs_embeds=embeds[:, step : step + 1],
                attention_mask=None if mask is None else mask[:, : step + 1],
                position_ids=ids[..., step : step + 1],
                past_key_values=first.past_key_values,
                use_cache=True,
            ).last_hidden_state
            for step in range(length, length + new)
        ]
    log.look("at the end of the run")
    after = torch.cat(decoded, 1) if decoded else embeds[:, :0]
    return Run(prompt, first.last_hidden_state, context.trace, log, after, context)


ROUNDING = 1e-5
"""Relative size of a rounding error: above those of sums in another order, far below any difference that counts."""


def rounded(value: Any, seed: int) -> Any:
    """Floats with a random rounding error, also inside tuples; other values are unchanged."""
    if isinstance(value, tuple):
        return tuple(rounded(part, seed) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return value * (1 + ROUNDING * draw)


def _rounding(give: Callable[[Any], Any], seed: int) -> Callable[[Any], Any]:
    return lambda read: rounded(give(read), seed)


@torch.no_grad()
def baseline(case: Case) -> tuple[Tensor, Log]:
    """Final states [batch, S, width] of the untouched model, and the inputs of its layers."""
    made, log = SyntheticBatch(case.rows, case.padding), Log()
    stack = stack_of(model_of(case.family))
    with _logged(stack, log):
        output = stack(
            inputs_embeds=made.embeds(WIDTH),
            attention_mask=made.mask,
            position_ids=FAMILIES[case.family].positions(made),
            use_cache=False,
        )
    return output.last_hidden_state, log


@contextmanager
def _logged(stack: Any, log: Log) -> Iterator[None]:
    """Record the inputs and outputs of the layers themselves, inside the wrappers of later pruning contexts."""

    def look(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not log.open:
            return forward(*args, **kwargs)
        log.entered.append((args[0] if args else kwargs["hidden_states"]).clone())
        log.tables.append(joined(kwargs["position_embeddings"], len(log.entered[-1])))
        output = forward(*args, **kwargs)
        log.left.append((output[0] if isinstance(output, tuple) else output).clone())
        return output

    with ExitStack() as undo:
        for layer in stack.layers:
            undo.enter_context(shadowed(layer, "forward", look))
        yield


def joined(tables: tuple[Tensor, Tensor], batch: int) -> Tensor:
    """Rotary tables (cos, sin) as one [batch, M, C], axes of positions side by side."""
    both = torch.cat(tables, -1)
    both = both.movedim(0, -2).flatten(-2) if both.dim() == 4 else both
    return both.expand(batch, -1, -1).clone()
