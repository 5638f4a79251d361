"""What a store takes of question answering: a set of answers, each with its cost, and the evaluator's scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from tokenprune.errors import OptionError
from tokenprune.sweeps.plan import digest
from tokenprune.utils.arguments import shown, unicode_problem

_PLAIN = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
MOST = 2**53  # whole numbers that the store holds exactly
LARGEST = 1e30  # of FLOPs, bytes and scores: sums and squares of them stay finite
LONGEST_PATH = 80  # of a field in a message


def _unicode(text: str) -> str:
    if problem := unicode_problem(text):
        raise ValueError(f"its text {problem}")
    return text


def _plain(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        _unicode(json.dumps(value, allow_nan=False, ensure_ascii=False))
    except RecursionError:
        raise ValueError("it is nested too deep; leave it out") from None
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[Text, Field(min_length=1)]
Json = Annotated[dict[str, JsonValue], AfterValidator(_plain)]


class Answer(BaseModel):
    """One answer of a model, and what its prefill cost.

    Attributes:
        sample: the evaluator's name or number of it, unique in its `AnswerSet`.
        text: the prompt.
        answer, target: what the model said, and what was expected.
        ran: the strategy with the options that ran.
        image_tokens, other_tokens: of the prompt.
        equivalent_tokens: the mean over decoder layers of the image tokens that enter the layer.
        layers: image tokens entering each decoder layer; neither they nor `equivalent_tokens` exceed `image_tokens`.
        flops, flops_by_part: of the prefill, and by its parts.
        flops_unpruned: of the same prompt without pruning.
        kv_bytes: of the KV cache after the prefill.
        milliseconds: by step.
        metrics: what the evaluator says of this answer, by metric: numbers, or any other JSON.
    """

    model_config = _PLAIN

    sample: Name
    text: Text | None = None
    answer: Text | None
    target: Text | None = None
    ran: Text | None = None
    image_tokens: int = Field(ge=0, le=MOST)
    other_tokens: int | None = Field(default=None, ge=0, le=MOST)
    equivalent_tokens: float = Field(ge=0)
    layers: list[Annotated[int, Field(ge=0, le=MOST)]] = []
    flops: float | None = Field(default=None, ge=0, le=LARGEST)
    flops_by_part: dict[Text, float] = {}
    flops_unpruned: float | None = Field(default=None, ge=1, le=LARGEST)
    kv_bytes: float | None = Field(default=None, ge=0, le=LARGEST)
    milliseconds: dict[Text, float] = {}
    metrics: Json = {}

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Answer:
        most = max([self.equivalent_tokens, *self.layers])
        if most > self.image_tokens:
            raise ValueError(f"{most:g} tokens in a layer, but {self.image_tokens} image tokens in all")
        return self


class Score(BaseModel):
    """An evaluator's score of all answers of a set.

    Attributes:
        value: of the metric.
        stderr: its standard error; None if the evaluator gives none.
        higher_is_better: False for error rates and the like.
    """

    model_config = _PLAIN

    value: float = Field(ge=-LARGEST, le=LARGEST)
    stderr: float | None = Field(default=None, ge=0, le=LARGEST)
    higher_is_better: bool = True


class AnswerSet(BaseModel):
    """The answers of one model, under one strategy, to the questions of one dataset.

    Attributes:
        model, dataset, split: that answered, and what; the dataset is the evaluator's task.
        protocol: how it was asked and scored, such as the evaluator's name.
        strategy, label: its name; with its options and budget.
        given, budget, seed: options, budget and seed that the user gave.
        run: of the evaluator, to find its files again.
        environment: where and with what the answers were made, as plain data.
        scores: of all answers together, by metric.
        answers: one or more.
    """

    model_config = _PLAIN

    model: Name
    dataset: Name
    split: Text = ""
    protocol: Text = "answers"
    strategy: Name
    label: Name
    given: Json = {}
    budget: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    run: Text = ""
    environment: Json = {}
    scores: dict[Name, Score] = {}
    answers: list[Answer] = Field(min_length=1)

    @field_validator("answers")
    @classmethod
    def _once(cls, value: list[Answer]) -> list[Answer]:
        seen: set[str] = set()
        for one in value:
            if one.sample in seen:
                raise ValueError(f"sample {one.sample!r} occurs twice; give each sample one answer")
            seen.add(one.sample)
        return value

    @property
    def configuration(self) -> str:
        """A hash of what is compared: model, dataset, strategy, budget and seed."""
        return digest(["answers", *self.known.values()])

    @property
    def known(self) -> dict[str, Any]:
        """What is stored of the configuration, by column."""
        names = ("model", "dataset", "split", "protocol", "strategy", "label")
        given = json.dumps(self.given, sort_keys=True)
        return {name: getattr(self, name) for name in names} | {
            "given": given,
            "budget": self.budget,
            "seed": self.seed,
        }

    @property
    def about(self) -> str:
        """In messages."""
        return f"{self.label} with {self.model} on {self.dataset}"


def checked_set(given: Any, where: str = "set of answers") -> AnswerSet:
    """A set of answers, of a mapping with its fields.

    Args:
        given: the mapping, or a set already.
        where: it comes from, for the message.

    Raises:
        OptionError: it is none, in one line.
    """
    if isinstance(given, AnswerSet):
        return given
    if not isinstance(given, Mapping):
        raise OptionError(f"{where}: {shown(given)} found, expected an AnswerSet, or a mapping with its fields")
    try:
        return AnswerSet.model_validate(dict(given))
    except ValidationError as error:
        raise OptionError(f"{where}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    """The first finding of pydantic, and how many there are: a set may have thousands of answers."""
    first, *more = error.errors(include_url=False)
    path = ".".join(map(str, first["loc"])) or "it"
    path = path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}…"
    if first["type"] == "missing":
        text = f"{path} is missing"
    elif first["type"] == "extra_forbidden":
        text = f"unknown field {path!r}; leave it out"
    elif first["type"] == "value_error":
        text = f"{path}: {first['msg'].removeprefix('Value error, ')}"
    else:
        text = f"{path}: found {shown(first['input'])}, but {first['msg'][:1].lower()}{first['msg'][1:]}"
    rest = f"; {len(more)} more problem{'s' if len(more) > 1 else ''}" if more else ""
    return " ".join(f"{text}{rest}".split())
