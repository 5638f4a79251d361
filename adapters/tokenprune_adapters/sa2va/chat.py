"""The chat formats of Sa2VA's releases: one turn, with the image in it, and how an answer ends."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE = "<image>"
IMAGE_START, IMAGE_END = "<img>", "</img>"
PHRASE = "Please segment {} in this image."
"""What the authors' evaluation on referring data asks."""


@dataclass(frozen=True)
class ChatFormat:
    """The words around what the user says. No release has a system message.

    Attributes:
        before: the user's turn begins with it.
        between: it ends the user's turn, and the model continues.
        stops: texts that end an answer.
    """

    before: str
    between: str
    stops: tuple[str, ...]

    def prompt(self, said: str, answer: str = "") -> str:
        """A whole prompt of one turn, with what the model is given as its answer."""
        return f"{self.before}{said}{self.between}{answer}"

    def given_answer(self, prompt: str) -> str:
        """The last answer in a whole prompt; "" if it has none."""
        _, found, answer = prompt.rpartition(self.between)
        return self.without_stop(answer) if found else ""

    def without_stop(self, answer: str) -> str:
        """An answer without the text that ends it."""
        answer = answer.strip()
        for stop in self.stops:
            answer = answer.removesuffix(stop).strip()
        return answer


_CHATML = ChatFormat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>"))
FORMATS = {
    "qwen_chat": _CHATML,
    "internlm2_chat": ChatFormat(_CHATML.before, _CHATML.between, ("<|im_end|>",)),
    # Sa2VA-4B has this one, though its decoder is a Qwen2.5, to whose tokenizer these are words like any other
    "phi3_chat": ChatFormat("<|user|>\n", "<|end|>\n<|assistant|>\n", ("<|end|>",)),
}
"""By the name that config.json gives as `template`."""
