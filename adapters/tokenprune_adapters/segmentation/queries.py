"""Queries of segmentation models: their checks, and LISA's templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenprune.errors import InputError
from tokenprune.utils.arguments import listed, shown, unicode_problem
from tokenprune_adapters.llava.prompt import IM_END, IM_START, IMAGE_PLACEHOLDER, conversation

PHRASE = "What is {} in this image? Please output segmentation mask."
SENTENCE = "{} Please output segmentation mask."


def as_list(value: Any, what: str) -> list[Any]:
    """One text or a list of texts, as a list; the texts are not checked.

    Raises:
        InputError: neither a string nor a sequence, or an empty one.
    """
    if not isinstance(value, (str, Sequence)) or isinstance(value, bytes):
        raise InputError(f"{what} is a {type(value).__name__}, expected a string or a list of strings")
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise InputError(f"{what} is an empty list, expected at least one string")
    return texts


def checked_query(query: object, special: Sequence[str]) -> str:
    """The query without white space around it.

    Args:
        query: the user's query.
        special: tokens with a special meaning in the model's prompts, such as [SEG].

    Raises:
        InputError: not a string, not valid Unicode, empty, or with a special token in it.
    """
    problem = text_problem(query)
    if problem:
        raise InputError(f"query {problem}")
    text = str(query).strip()
    if not text:
        raise InputError("query is empty; describe what to segment")
    for token in (IMAGE_PLACEHOLDER, IM_START, IM_END, *special, "</s>", "<s>"):
        if token in text:
            raise InputError(f"query {text[:60]!r} contains {token}; pass a complete prompt as prompt= instead")
    return text


def text_problem(text: object) -> str:
    """The problem with a text, to be appended to its name in a message; empty if it can be tokenized."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, expected a string"
    problem = unicode_problem(text)
    return f"{text[:60]!a} {problem}" if problem else ""


def is_sentence(query: str) -> bool:
    """Whether a query counts as a sentence: it ends in "." or "?" (ours; LISA's datasets label each query)."""
    return query.endswith((".", "?"))


def sentence_flags(queries: Sequence[str], given: bool | Sequence[bool] | None) -> list[bool]:
    """Which queries are sentences: from `given`, one flag or one for each query, else by `is_sentence`.

    Raises:
        InputError: not flags, or not as many as queries.
    """
    if given is None:
        return [is_sentence(text) for text in queries]
    flags = [given] * len(queries) if isinstance(given, bool) else listed(given)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise InputError(f"is_sentence={shown(given)} found, expected True or False, or a list with one for each query")
    if len(flags) != len(queries):
        raise InputError(f"is_sentence has {len(flags)} values for {len(queries)} queries; pass one for each")
    return flags


def forced_prompt(query: str, sentence: bool, mark_image: bool, answer: str) -> str:
    """The prompt of LISA's evaluation, with the answer that requests the mask.

    Args:
        query: a phrase ("the red car") or a sentence ("Which of these can fly?").
        sentence: whether it is a sentence.
        mark_image: whether to put <im_start> and <im_end> around the image.
        answer: the answer, such as "[SEG].".
    """
    question = (SENTENCE if sentence else PHRASE).format(query)
    return conversation(f"{image_mark(mark_image)}\n {question}", answer)


def open_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt for a generated answer.

    A sentence is used unchanged, as in LISA's chat; a phrase is inserted into the template of the evaluation (ours).
    """
    question = query if sentence else PHRASE.format(query)
    return conversation(f"{image_mark(mark_image)}\n{question}")


def image_mark(mark: bool) -> str:
    """The image placeholder of a prompt, with or without <im_start> and <im_end>."""
    return f"{IM_START}{IMAGE_PLACEHOLDER}{IM_END}" if mark else IMAGE_PLACEHOLDER


def given_answer(prompt: str, default: str) -> str:
    """The last answer in a whole prompt; `default` if it contains no "ASSISTANT:"."""
    if "ASSISTANT:" not in prompt:
        return default
    return prompt.rsplit("ASSISTANT:", 1)[1].removesuffix("</s>").strip()
