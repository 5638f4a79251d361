"""Answers that a model is expected to give, learnt from those that it gave to prompts of the same template."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from tokenprune.errors import InputError, OptionError
from tokenprune.utils.arguments import shown
from tokenprune_adapters.common.tokenizer import TextTokenizer
from tokenprune_adapters.segmentation.queries import as_list, text_problem

TEMPLATES = 64  # templates that a model remembers answers of
ANSWERS = 16  # different answers to each
TOKENS = 48  # tokens of an answer that are remembered: no draft is longer

Draft = bool | str | Sequence[str]
"""See `Segmenter.segment`."""


class AnswerDrafts:
    """What a model said so far, template by template. All sizes are bounded.

    Args:
        usual: ids of the answers to expect before anything was learnt, the most likely one first.
    """

    def __init__(self, usual: Sequence[Sequence[int]] = ()) -> None:
        self._usual = [tuple(ids[:TOKENS]) for ids in usual]
        self._learnt: OrderedDict[str | None, Counter[tuple[int, ...]]] = OrderedDict()

    def learn(self, template: str | None, answer: Sequence[int]) -> None:
        """Remember an answer to a prompt of a template; None = a prompt of one's own."""
        counts = self._learnt.setdefault(template, Counter())
        self._learnt.move_to_end(template)
        counts[tuple(answer[:TOKENS])] += 1
        if len(counts) > ANSWERS:
            del counts[min(counts, key=counts.__getitem__)]
        if len(self._learnt) > TEMPLATES:
            self._learnt.popitem(last=False)

    def expect(self, template: str | None, said: Sequence[int] = ()) -> list[int]:
        """How an answer that began with `said` is expected to continue: as the most frequent one that began so."""
        begun = tuple(said)
        known = [answer for answer, _ in self._learnt.get(template, Counter()).most_common()]
        for answer in (*known, *self._usual):
            if len(answer) > len(begun) and answer[: len(begun)] == begun:
                return list(answer[len(begun) :])
        return []


def template_of(prompt: str, query: str | None) -> str | None:
    """The prompt without its query; None for a prompt that was not made from a query."""
    return None if query is None else prompt.replace(query.strip(), "{}")


def given_drafts(draft: object, tokenizer: TextTokenizer) -> list[list[int]]:
    """The ids of the answers in `draft=`.

    Raises:
        OptionError: not texts.
        InputError: an empty text, or one that is not Unicode.
    """
    if not isinstance(draft, (str, Sequence)) or isinstance(draft, bytes):
        raise OptionError(f"draft={shown(draft)} found, expected True, False, an answer, or a list of answers")
    texts = as_list(draft, "draft")
    for text in texts:
        problem = text_problem(text) or ("" if text.strip() else "is empty; pass draft=False to generate without one")
        if problem:
            raise InputError(f"draft {problem}")
    return answer_ids(texts, tokenizer)


def answer_ids(texts: Sequence[str], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of answers as they follow a prompt."""
    return [tokenizer.encode(text.strip(), bos=False) for text in texts]
