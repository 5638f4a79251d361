"""Queries of segmentation models: what may be asked, and the templates that LISA introduced."""

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
    """One text or a list of them, as a list; the texts themselves are not looked at.

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
        query: what the user asked.
        special: tokens of the model that have a meaning of their own in its prompts, [SEG] above all.

    Raises:
        InputError: not a string, no proper Unicode, empty, or with such a token in it.
    """
    problem = text_problem(query)
    if problem:
        raise InputError(f"query {problem}")
    text = str(query).strip()
    if not text:
        raise InputError("query is empty; say in words what to segment")
    for token in (IMAGE_PLACEHOLDER, IM_START, IM_END, *special, "</s>", "<s>"):
        if token in text:
            raise InputError(f"query {text[:60]!r} contains {token}; give such a text as prompt=, complete")
    return text


def text_problem(text: object) -> str:
    """What keeps something from being a text that a tokenizer takes, after its name; empty where nothing does."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, expected a string"
    problem = unicode_problem(text)
    return f"{text[:60]!a} {problem}" if problem else ""


def is_sentence(query: str) -> bool:
    """Whether a query is taken for a sentence: it ends in "." or "?" (ours; LISA's datasets say it for each query)."""
    return query.endswith((".", "?"))


def sentence_flags(queries: Sequence[str], given: bool | Sequence[bool] | None) -> list[bool]:
    """Which queries are sentences: as `given`, once or for each, else by `is_sentence`.

    Raises:
        InputError: something else than flags, or not as many as queries.
    """
    if given is None:
        return [is_sentence(text) for text in queries]
    flags = [given] * len(queries) if isinstance(given, bool) else listed(given)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise InputError(f"is_sentence={shown(given)} found, expected True or False, once or for each query")
    if len(flags) != len(queries):
        raise InputError(f"is_sentence has {len(flags)} values for {len(queries)} queries; give one for each")
    return flags


def forced_prompt(query: str, sentence: bool, mark_image: bool, answer: str) -> str:
    """The prompt of LISA's evaluation, with the answer that asks for the mask.

    Args:
        query: a phrase ("the red car") or a sentence ("Which of these can fly?").
        sentence: which of both it is.
        mark_image: put <im_start> and <im_end> around the image.
        answer: "[SEG]." and the like.
    """
    question = (SENTENCE if sentence else PHRASE).format(query)
    return conversation(f"{image_mark(mark_image)}\n {question}", answer)


def open_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt of free use, for the model to answer.

    A sentence is asked as it is, as LISA's chat does; a phrase goes into the template of the evaluation (ours).
    """
    question = query if sentence else PHRASE.format(query)
    return conversation(f"{image_mark(mark_image)}\n{question}")


def image_mark(mark: bool) -> str:
    """What stands for the image in a prompt, within <im_start> and <im_end> or bare."""
    return f"{IM_START}{IMAGE_PLACEHOLDER}{IM_END}" if mark else IMAGE_PLACEHOLDER


def given_answer(prompt: str, default: str) -> str:
    """The last answer in a whole prompt; `default` where no ASSISTANT speaks in it."""
    if "ASSISTANT:" not in prompt:
        return default
    return prompt.rsplit("ASSISTANT:", 1)[1].removesuffix("</s>").strip()
