"""LISA's question templates and the rule that chooses between them."""

from __future__ import annotations

from tokenprune.errors import InputError
from tokenprune_adapters.llava_prompt import IM_END, IM_START, IMAGE_PLACEHOLDER, conversation

SEG_TOKEN = "[SEG]"
FORCED_ANSWER = "[SEG]."
PHRASE = "What is {} in this image? Please output segmentation mask."
SENTENCE = "{} Please output segmentation mask."


def checked_query(query: object) -> str:
    """The query without white space around it.

    Raises:
        InputError: not a string, empty, or with a token in it that has a meaning of its own in the prompt.
    """
    if not isinstance(query, str):
        raise InputError(f"query is a {type(query).__name__}, expected a string")
    text = query.strip()
    if not text:
        raise InputError("query is empty; say in words what to segment")
    for token in (IMAGE_PLACEHOLDER, IM_START, IM_END, SEG_TOKEN, "</s>", "<s>"):
        if token in text:
            raise InputError(f"query {text[:60]!r} contains {token}; give such a text as prompt=, complete")
    return text


def is_sentence(query: str) -> bool:
    """Whether a query is taken for a sentence: it ends in "." or "?" (ours; LISA's data sets say it for each query)."""
    return query.endswith((".", "?"))


def forced_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt of LISA's evaluation, with the answer that holds [SEG].

    Args:
        query: a phrase ("the red car") or a sentence ("Which of these can fly?").
        sentence: which of both it is.
        mark_image: put <im_start> and <im_end> around the image.
    """
    question = (SENTENCE if sentence else PHRASE).format(query)
    return conversation(f"{_image(mark_image)}\n {question}", FORCED_ANSWER)


def open_prompt(query: str, sentence: bool, mark_image: bool) -> str:
    """The prompt of free use, for the model to answer.

    A sentence is asked as it is, as LISA's chat does; a phrase goes into the template of the evaluation (ours).
    """
    question = query if sentence else PHRASE.format(query)
    return conversation(f"{_image(mark_image)}\n{question}")


def _image(mark: bool) -> str:
    return f"{IM_START}{IMAGE_PLACEHOLDER}{IM_END}" if mark else IMAGE_PLACEHOLDER
