"""Which document each prefill belongs to: models of lmms-eval look documents up, row by row, before `generate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import Instance

from tokenprune.engine.run import PruningRun
from tokenprune.errors import EngineError
from tokenprune.evaluation.contenders import Contender
from tokenprune_lmms_eval.records import decoder_spec, record_of

Document = tuple[Any, ...]  # task, split, number


def document_of(request: Instance) -> Document:
    """The document that a request is about."""
    number, task, split = request.args[-3:]
    return task, split, number


class Stopped(BaseException):
    """`generate` failed. No `Exception`, since some models of lmms-eval log those and answer with an empty text.

    Attributes:
        error: what it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Watch:
    """Collects a record for each answer.

    Args:
        run: of the open pruning context.
        model: of transformers.
        contender: the strategy.
    """

    def __init__(self, run: PruningRun, model: Any, contender: Contender) -> None:
        self._run, self._contender = run, contender
        self._spec = decoder_spec(model.config)
        self._element_bytes = model.dtype.itemsize
        self._asked: list[Document] = []
        self._records: dict[Document, list[dict[str, Any]]] = defaultdict(list)

    def documents(self, task_dict: Any) -> Any:
        """`task_dict` of a model, as it is, but that lookups are noted."""
        return _Documents(task_dict, self._asked.append)

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `generate` and take the records of its rows. Raises Stopped where it fails."""
        before = self._run.prefill
        try:
            answers = generate(*args, **kwargs)
            if self._run.prefill is before:
                raise EngineError("generate() ran no prefill in the pruning context; report it with the model")
            self._take(len(kwargs["input_ids"]))
        except Exception as error:
            raise Stopped(error) from error
        return answers

    def _take(self, rows: int) -> None:
        """The records of the rows of the latest prefill. The next batch may have been looked up already."""
        documents, computed = self._asked[:rows], len(self._run.trace.ledger.image_tokens)
        del self._asked[:rows]
        if len(documents) != rows or computed % rows:
            raise EngineError(
                f"generate() ran {rows} rows, {computed} in the prefill, for {len(documents)} documents; give "
                "--batch_size 1"
            )
        each = computed // rows  # beams
        for row, document in enumerate(documents):
            record = record_of(self._contender, self._run.trace, row * each, self._spec, self._element_bytes)
            self._records[document].append(record)

    def check_all_answered(self) -> None:
        """Raise EngineError if more documents were looked up than answered: records may be those of others."""
        if self._asked:
            raise EngineError(f"the model looked up {len(self._asked)} documents more than it answered; report it")

    def record(self, document: Document) -> dict[str, Any]:
        """The next record of a document, in the order in which its requests ran.

        Raises:
            EngineError: it was answered without a prefill.
        """
        if not self._records[document]:
            task, _, number = document
            raise EngineError(f"task {task!r}, document {number}: the model answered it without generate()")
        return self._records[document].pop(0)


class Watched:
    """A model whose `generate` is watched; all else is the model's."""

    def __init__(self, model: Any, watch: Watch) -> None:
        self._model, self._watch = model, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See `Watch.generate`."""
        return self._watch.generate(self._model.generate, *args, **kwargs)


class _Documents:
    """`task_dict[task][split][number]`, each level as it is."""

    def __init__(self, inner: Any, note: Callable[[Document], None], path: Document = ()) -> None:
        self._inner, self._note, self._path = inner, note, path

    def __getitem__(self, key: Any) -> Any:
        found, path = self._inner[key], (*self._path, key)
        if len(path) < 3:
            return _Documents(found, self._note, path)
        self._note(path)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
