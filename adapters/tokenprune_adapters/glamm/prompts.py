"""GLaMM's question and answer templates, and the seeded draw from them."""

from __future__ import annotations

import hashlib
import random

from tokenprune_adapters.segmentation.queries import SENTENCE, image_mark

SEG_TOKEN = "[SEG]"
PHRASE_START, PHRASE_END = "<p>", "</p>"
REGION_TOKENS = ("<bbox>", "<point>")
OVERVIEW = "The {} provides an overview of the picture.\n"
GROUNDED_DESCRIPTION = (
    "Could you please give me a detailed description of the image? Please respond with interleaved segmentation "
    "masks for the corresponding parts of the answer."
)
"""One of the questions that grounded conversation generation is asked with."""

# The authors draw from these, each with and without its last mark.
_WORDINGS = (
    "Can you segment the {} in this image?",
    "Please segment {} in this image.",
    "What is {} in this image? Please respond with segmentation mask.",
    "What is {} in this image? Please output segmentation mask.",
    "Could you provide a segmentation mask for the {} in this image?",
    "Please identify and segment the {} in this image.",
    "Where is the {} in this picture? Please respond with a segmentation mask.",
    "Can you highlight the {} in this image with a segmentation mask?",
)
QUESTIONS = (*_WORDINGS, *(text[:-1] for text in _WORDINGS))
ANSWERS = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
    "[SEG].",
)


def turn(query: str, sentence: bool, seed: int) -> tuple[str, str]:
    """Question and given answer for one query.

    The authors draw both templates again each time. Here the draw depends on the seed and the query alone (ours), so
    that a query is asked in the same words in every conversation.

    Args:
        query: a phrase ("the red car") or a sentence ("Which of these can fly?").
        sentence: which of both it is. GLaMM's referring data has no sentences; they are asked as LISA's are (ours).
        seed: of the draw.
    """
    draw = random.Random(hashlib.sha256(f"{seed}:{query}".encode()).digest())
    question, answer = draw.choice(QUESTIONS), draw.choice(ANSWERS)
    return (SENTENCE if sentence else question).format(query), answer


def without_overview(text: str) -> str:
    """A turn's question, of what the user says in it once the image is taken out."""
    return text.removeprefix(OVERVIEW.format("").strip()).strip()


def about_image(question: str, mark_image: bool) -> str:
    """A conversation's first question, which holds the image."""
    return OVERVIEW.format(image_mark(mark_image)) + question
