"""The prompts of segmentation models, built from queries or passed whole, and the mask tokens in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tokenprune.errors import InputError
from tokenprune.utils.arguments import one_of
from tokenprune_adapters.common.tokenizer import TextTokenizer
from tokenprune_adapters.llava.prompt import prompt_ids, questions
from tokenprune_adapters.segmentation.queries import (
    as_list,
    checked_query,
    forced_prompt,
    given_answer,
    open_prompt,
    sentence_flags,
    text_problem,
)


class Prompts:
    """The prompt side of a segmentation model. The defaults are LISA's; other families override them."""

    seg_tokens: ClassVar[tuple[str, ...]] = ("[SEG]",)
    """The tokens that, in this order, request one mask; each has its own mask query."""
    forced_answer: ClassVar[str] = "[SEG]."
    """The answer that requests the mask of a query."""
    usual_answers: ClassVar[tuple[str, ...]] = (
        "It is [SEG].",
        "Sure, [SEG].",
        "Sure, it is [SEG].",
        "Sure, the segmentation result is [SEG].",
        "[SEG].",
    )
    """The answers that the family is trained on, expected of a generating model before it has answered."""
    reads_mask_token: ClassVar[bool] = False
    """Whether a mask is made from the state of its mask token itself, and not from the state before it, which predicts
    the token."""
    tokenizer: TextTokenizer
    mark_image: bool
    """Whether prompts have <im_start> and <im_end> around the image."""

    @property
    def seg_ids(self) -> list[int]:
        """Ids of `seg_tokens`; the loader ensures that the tokenizer has them."""
        return [found for token in self.seg_tokens if (found := self.tokenizer.token_id(token)) is not None]

    def special_tokens(self) -> Sequence[str]:
        """Tokens that a query must not contain."""
        return self.seg_tokens

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a whole prompt, with `IMAGE_ID` for the image. Raises InputError unless it has `<image>` once."""
        return prompt_ids(self.tokenizer, prompt)

    def ask(self, queries: list[str], sentences: list[bool], answer: str) -> list[str]:
        """A whole prompt for each checked query, in LISA's templates; arguments as in `Segmenter.segment`."""
        both = zip(queries, sentences, strict=True)
        if answer == "forced":
            return [forced_prompt(text, flag, self.mark_image, self.forced_answer) for text, flag in both]
        return [open_prompt(text, flag, self.mark_image) for text, flag in both]

    def given_answer(self, prompt: str) -> str:
        """The last answer in a whole prompt."""
        return given_answer(prompt, self.forced_answer)

    def question(self, text: str) -> str:
        """The question in the user's text of a turn, which has no <image> and markers."""
        return text

    def prompts(
        self,
        query: str | Sequence[str] | None,
        answer: str = "forced",
        prompt: str | Sequence[str] | None = None,
        is_sentence: bool | Sequence[bool] | None = None,
    ) -> list[str]:
        """The whole prompts for queries, or the checked `prompt`.

        Arguments and errors as in `Segmenter.segment`.
        """
        one_of("answer", answer, ("forced", "generate"))
        if (query is None) == (prompt is None):
            raise InputError(
                f"{'neither' if query is None else 'both'} of query and prompt given, expected one of them"
            )
        if prompt is not None:
            return self._checked_prompts(as_list(prompt, "prompt"), answer)
        queries = [checked_query(text, self.special_tokens()) for text in as_list(query, "query")]
        return self.ask(queries, sentence_flags(queries, is_sentence), answer)

    def wordings(self, prompts: Sequence[str], queries: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
        """The texts of each prompt by wording, see `segmentation.SegmenterInputs.texts`.

        Args:
            prompts: complete texts.
            queries: the queries, if the prompts were built from them.
        """
        asked = [[self.question(text) for text in questions(prompt)] for prompt in prompts]
        if queries is None:
            return {"question": asked, "query": asked}
        stripped = [text.strip() for text in queries]
        # one row for each query, or all queries in one conversation
        rows = [[text] for text in stripped] if len(prompts) == len(stripped) else [stripped]
        return {"question": asked, "query": rows}

    def mask_places(self, ids: Sequence[int]) -> list[int]:
        """Indices in a sequence of ids at which the tokens of a mask begin."""
        wanted = self.seg_ids
        group = len(wanted)
        return [place for place in range(len(ids) - group + 1) if list(ids[place : place + group]) == wanted]

    def _checked_prompts(self, texts: list[Any], answer: str) -> list[str]:
        for text in texts:
            problem = text_problem(text)
            if problem:
                raise InputError(f"prompt {problem}")
            ids = self.prompt_ids(text)
            if answer == "forced" and not self.mask_places(ids):
                wanted = " ".join(self.seg_tokens)
                raise InputError(f"the prompt contains no {wanted}; insert one for each mask, or use answer='generate'")
        return texts
