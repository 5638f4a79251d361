"""`Pruned`: what a model class of lmms-eval gets in front of it, so that its answers are generated under a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output

import tokenprune as tp
from tokenprune.errors import IncompatibleError, InputError, UnsupportedError
from tokenprune_lmms_eval.arguments import contender_of, own_arguments
from tokenprune_lmms_eval.manifests import VARIABLE
from tokenprune_lmms_eval.records import KEY
from tokenprune_lmms_eval.watch import Stopped, Watch, Watched, document_of


@dataclass
class PrunedCounts(TokenCounts):
    """lmms-eval writes these beside every answer, in the file of samples.

    Attributes:
        pruning: see `records.record_of`.
    """

    pruning: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the file of samples."""
        return {**super().to_dict(), KEY: self.pruning}


# What a task says to one model alone, by the name of `--model`.
BY_MODEL = ("lmms_eval_specific_kwargs", "model_specific_generation_kwargs", "model_specific_target_kwargs")


class Pruned:
    """To be inherited from before a model class of lmms-eval, whose code runs unchanged.

    Attributes:
        wraps: name of that model in lmms-eval.
    """

    wraps: ClassVar[str]

    def __init__(self, strategy: str = "none", budget: float | None = None, **arguments: Any) -> None:
        own = own_arguments(super().__init__)
        options = {name: arguments.pop(name) for name in list(arguments) if name not in own}
        self.contender = contender_of(strategy, budget, options, own)  # before the weights are loaded
        self._watch: Watch | None = None
        super().__init__(**arguments)
        found = tp.compatible(self.contender.strategy, self.model)
        if found.reason:
            raise IncompatibleError(found.reason)

    @property
    def model(self) -> Any:
        """The model of transformers; while answers are generated, its `generate` is watched."""
        model = super().model  # type: ignore[misc]
        return model if self._watch is None else Watched(model, self._watch)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, with the record of each among its token counts."""
        for request in requests:
            self._check_prompt(request)
        documents = self.task_dict
        with tp.prune(self.model, self.contender.strategy) as run:
            watch = Watch(run, self.model, self.contender)
            try:
                self._watch, self.task_dict = watch, watch.documents(documents)
                answers = super().generate_until(requests)  # type: ignore[misc]
            except Stopped as stopped:
                raise stopped.error from stopped.error.__cause__
            finally:
                self._watch, self.task_dict = None, documents
            watch.check_all_answered()
        return [self._recorded(watch, request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _recorded(self, watch: Watch, request: Instance, answer: Any) -> GenerationResult:
        text, counts = unwrap_generation_output(answer)
        known = vars(counts) if counts is not None else {}
        return GenerationResult(text, PrunedCounts(**known, pruning=watch.record(document_of(request))))

    def _check_prompt(self, request: Instance) -> None:
        """lmms-eval looks up what a task says to one model by the name of `--model`, which may be another here."""
        for task in {getattr(argument, "__self__", None) for argument in request.args if callable(argument)}:
            name, config = getattr(task, "model_name", self.wraps), getattr(task, "config", None)
            for key in BY_MODEL:
                by_model = getattr(config, key, None) or {}
                if self.wraps in by_model and name not in by_model:
                    raise InputError(
                        f"task {request.task_name!r} has {key} for {self.wraps!r}, which lmms-eval does not give to "
                        f"{name!r}; set {VARIABLE}=1 and give --model {self.wraps}"
                    )

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Refused: the text that is scored would take part in the choice of tokens."""
        raise self._unmeasured(requests, "loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        """Refused: an answer has no single record."""
        raise self._unmeasured(requests, "generate_until_multi_round")

    def _unmeasured(self, requests: Sequence[Instance], kind: str) -> UnsupportedError:
        name = requests[0].task_name if requests else ""
        return UnsupportedError(
            f"task {name!r} is of output_type {kind}, which is not measured under pruning; choose one of generate_until"
        )
