"""The per-layer token scheduler: walks the layers, asks the strategy at every stage, keeps the state and the ledger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.core.decisions import Decision, Keep, Merge, Restore
from tokenprune.core.layout import SequenceLayout
from tokenprune.core.ledger import LayerEntry, Ledger, LookAhead
from tokenprune.core.reads import PositionPrior, Read
from tokenprune.core.scheduling.plan import PlannedStage, RowGroup, plan
from tokenprune.core.scheduling.read_checks import read_checks
from tokenprune.core.scheduling.state import TokenState, in_range
from tokenprune.core.scheduling.validation import check_target, decision_checks
from tokenprune.core.stage import Positions, Shape, Stage
from tokenprune.core.strategy import Strategy
from tokenprune.core.tokens import Tokens
from tokenprune.core.trace import StageTrace, Trace
from tokenprune.errors import PluginError
from tokenprune.plugins.attribution import blamed_strategy
from tokenprune.plugins.readonly import LeakDetector
from tokenprune.utils.host_copies import on_host
from tokenprune.utils.torch_state import same_settings


class TokenScheduler(ABC):
    """Runs one strategy over one prefill, layer by layer.

    Subclasses hold the hidden states: `hidden` and `write` read and replace the image tokens' states, `provide` answers
    reads. They call `enter(layer)` before every layer and `finish()` after the last.

    Attributes:
        strategy: bound to this run's shape.
        model: name of the model, for messages.
        layout: of the batch.
        state: the current state of the image tokens.
        active: bool [batch, N], `state.active` in the host's memory.
        trace: of all stages so far.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: SequenceLayout,
        layers: int,
        *,
        model: str,
        tower_layers: int = 0,
        heads: int = 0,
        tell: Callable[..., None] | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        """Raises IncompatibleError if a stage requires a read that is not provided, and the errors of `plan`."""
        known = layout.on_host
        counts = known.counts.tolist()
        others = (known.prompt.sum(1) - known.counts).tolist()  # budgets and counts are of the prompt
        shapes = [Shape(layers, n, t, tower_layers, self.offers(), heads) for n, t in zip(counts, others, strict=True)]
        self.model, self.layout, self.layers, self.seed, self.strict = model, layout, layers, seed, strict
        self._tell = tell or _ignore
        self.strategy, self.planned = plan(strategy, shapes, model)
        self._due: dict[int, list[PlannedStage]] = {}
        for planned in self.planned:
            self._due.setdefault(planned.stage.layer, []).append(planned)
        exists = layout.slots >= 0
        self.state = TokenState.start(exists)
        self.active = known.slots >= 0
        self._counts = tuple(counts)
        self._marks: list[tuple[RowGroup, str, Tensor]] = []
        self._leaks = LeakDetector()
        policies: dict[str, str] = {"positions": self._position_policy()}
        ledger = Ledger(tuple(counts), tuple(others), sequence=layout.valid.shape[1])
        with blamed_strategy(self.strategy.name, ": __repr__()"):
            text = repr(self.strategy)
        self.trace = Trace(text, policies, layout, exists, ledger)

    # to implement -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def offers(self) -> frozenset[type[Read]]:
        """The kinds of reads that `provide` can answer."""

    @abstractmethod
    def provide(self, read: Read) -> Any:
        """The value of a read on entering a stage."""

    @abstractmethod
    def hidden(self) -> Tensor:
        """[batch, N, width]: the current (or last) state of every image token."""

    @abstractmethod
    def write(self, index: Tensor, values: Tensor) -> None:
        """Replace the states of image tokens `index` [batch, k] (−1 ignored) by `values` [batch, k, width]."""

    def owns(self, read: Read) -> bool:
        """Whether the value of a read is made for the stage only, so that it should be freed after the prefill."""
        return False

    def settle(self, planned: PlannedStage) -> None:  # noqa: B027 - optional to implement
        """Called after a stage's decision was carried out."""

    # the walk --------------------------------------------------------------------------------------------------------

    def due(self, layer: int) -> list[PlannedStage]:
        """The stages that begin at `layer`."""
        return self._due.get(layer, [])

    def reads_before(self, layer: int) -> set[Read]:
        """Reads of the stages that begin at `layer`."""
        return {read for planned in self.due(layer) for read in planned.stage.reads}

    def enter(self, layer: int) -> None:
        """Take the decisions of the stages that begin at `layer`."""
        for planned in self.due(layer):
            self._take(planned)

    def account(
        self, layer: int, width: int, scored_rows: int = 0, ahead: tuple[LookAhead, ...] = (), before: int = 0
    ) -> None:
        """Add a layer to the ledger: `width` positions per row were computed; for the others see `LayerEntry`."""
        ledger = self.trace.ledger
        tokens = self._counts, ledger.other_tokens, width
        ledger.entries.append(LayerEntry(layer, *tokens, scored_rows, ahead, before=before))

    def account_reused(self, keys: int) -> None:
        """Add to the ledger how many keys per row the latest layer took from what was computed ahead of it last."""
        entries = self.trace.ledger.entries
        *others, latest = entries[-1].ahead
        entries[-1] = replace(entries[-1], ahead=(*others, replace(latest, reused=keys)))

    def account_cached(self, layer: int, tokens: Sequence[int]) -> None:
        """Add to the ledger how many image tokens a layer's KV cache keeps after the prefill, per batch row."""
        entries = self.trace.ledger.entries
        entries[layer] = replace(entries[layer], cached=tuple(tokens))

    def finish(self) -> None:
        """Called after the last layer: notify observers, clear the memory."""
        self._tell("tokenprune_prefill_done")
        self._tell = _ignore  # the listener refers to this prefill: avoid a reference cycle
        for planned in self.planned:
            planned.group.memory.clear()
        self._leaks.warn_of_kept(self.strategy)

    # ------------------------------------------------------------------------------------------------------------------

    def _take(self, planned: PlannedStage) -> None:
        stage, group, name = planned.stage, planned.group, self.strategy.name
        self._tell("tokenprune_stage_entered", stage=stage)
        before = self.state if group.whole else self.state.only(group.rows, group.size)
        here = self.active if group.whole else self.active[:, : group.size] & group.rows[:, None]
        view = self._view(planned, before, planned.target, here)
        answer, checks = self._chosen(planned, view), read_checks(view, name, stage.name)
        decision = decision_checks(answer, before, checks, name, stage.name, width=self.width, dtype=self.dtype)
        # the state is made before the checks are read, since all that the host asks for is read at once
        state = before.after(in_range(decision, before.exists.shape[1]))
        found, active, *marks = on_host(checks.found(), state.active, *(rows for _, _, rows in self._marks))
        checks.verify(found)
        check_target(active.sum(1).tolist(), planned.target.tolist(), who=name, stage=stage.name)
        for (own, query, _), rows in zip(self._marks, marks, strict=True):
            self._mark(own, query, rows)
        self._marks.clear()
        values = self._merge(decision) if isinstance(decision, Merge) and decision.values is None else decision.values
        if values is not None:
            self.write(decision.index, values)
        self.state = state if group.whole else self.state.replaced(group.rows, state)
        if group.whole:
            self.active = active
        else:
            self.active = self.active.clone()
            self.active[group.rows, : active.shape[1]] = active[group.rows]
        self._counts = tuple(self.active.sum(1).tolist())
        self.settle(planned)
        self._record(stage, group, decision)

    def _chosen(self, planned: PlannedStage, tokens: Tokens) -> Any:
        """The strategy's decision; errors in its code carry its name."""
        stage, strategy, name = planned.stage, planned.group.strategy, self.strategy.name
        who = f"strategy {name!r}, stage {stage.name!r}"
        checks = (
            same_settings(lambda changed: PluginError(f"{who}: choose() {changed}; restore it before it returns"))
            if self.strict
            else nullcontext()
        )
        try:
            with checks, blamed_strategy(name, f", stage {stage.name!r}"):
                answer = strategy.choose(stage, tokens)
        except PluginError:
            read_checks(tokens, name, stage.name).verify()  # if they fail, they are the cause
            raise
        if not self.strict:
            return answer
        tokens.check_unwritten(name)
        for read, value in tokens.given().items():
            if self.owns(read):
                self._leaks.note(stage.name, read.field, value)
        return answer

    def policy(self, stage: Stage) -> Positions:
        """The position policy from a stage on."""
        return stage.positions or self.strategy.positions

    def _position_policy(self) -> str:
        walks: dict[RowGroup, list[Positions]] = {}
        for planned in self.planned:
            walks.setdefault(planned.group, []).append(self.policy(planned.stage))
        texts = [", then ".join(kind for kind, _ in groupby(walk)) for walk in walks.values()]
        return " or ".join(dict.fromkeys(texts)) or self.strategy.positions

    @property
    def width(self) -> int | None:
        """Hidden size that new states must have; None where states are not kept."""
        return self.hidden().shape[-1]

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the states; None where states are not kept."""
        return self.hidden().dtype

    def _merge(self, decision: Merge) -> Tensor:
        hidden = self.hidden()[:, : decision.weights.shape[-1]]
        weights = decision.weights.masked_fill((decision.index < 0)[..., None], 0)
        self.trace.ledger.merge_weights += weights.numel()
        return torch.einsum("bkj,bjd->bkd", weights.to(hidden.dtype), hidden)

    def _view(self, planned: PlannedStage, state: TokenState, target: Tensor, active: Tensor | None = None) -> Tokens:
        group = planned.group
        return Tokens(
            stage=planned.stage.name,
            stages=planned.own,
            layout=self.layout if group.whole else self.layout.only(group.rows),
            state=state,
            active=active,
            target=target,
            memory=group.memory,
            seed=self.seed,
            reads=planned.stage.reads,
            provide=partial(self._provided, group, state.exists),
            mark=partial(self._note_mark, group),
            strict=self.strict,
        )

    def _provided(self, group: RowGroup, exists: Tensor, read: Read) -> Any:
        value = read.at(self.layout) if isinstance(read, PositionPrior) else self.provide(read)
        if group.whole or read.axis is None:
            return value
        value = value.narrow(read.axis, 0, exists.shape[1])
        others = ~group.rows.to(value.device, non_blocking=True).reshape(-1, *[1] * (value.dim() - 1))
        return value.masked_fill(others, read.missing)

    def _note_mark(self, group: RowGroup, name: str, rows: Tensor) -> None:
        text = self.layout.on_host.text_slots
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != text.shape:
            found = f"{list(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
            raise PluginError(f"tokens.mark({name!r}) was given {found}; expected bool [batch, T] = {list(text.shape)}")
        self._marks.append((group, name, rows.clone()))

    def _mark(self, group: RowGroup, name: str, rows: Tensor) -> None:
        if not group.whole:  # what other groups marked, or else any token: every row needs one
            known = self.layout.on_host
            text = known.text_slots
            others = known.gather_text(known.queries[name]) if name in known.queries else text == text[:, :1]
            rows = torch.where(group.rows[:, None], rows, others)
        self.layout = self.layout.marked(name, rows)

    def _record(self, stage: Stage, group: RowGroup, decision: Decision) -> None:
        state = self.state
        kind = "restore" if isinstance(decision, Restore) else "merge" if isinstance(decision, Merge) else "keep"
        if isinstance(decision, Keep) and decision.rest == "park":
            kind = "park"
        scores = None if decision.scores is None else decision.scores.detach()
        if scores is not None and not group.whole:
            missing = state.exists.shape[1] - scores.shape[1]
            scores = pad(scores.float(), (0, missing), value=float("-inf"))
        record = StageTrace(
            stage.name,
            stage.layer,
            kind,
            state.active,
            state.parked,
            state.dropped,
            state.origin,
            state.mass,
            scores,
            state.lineage,
            None if group.whole else group.rows.to(state.exists.device, non_blocking=True),
        )
        self.trace.stages.append(record)
        self._tell("tokenprune_decision_taken", stage=record, decision=decision)


def _ignore(hook: str, **what: Any) -> None:
    """The listener if there is none."""
