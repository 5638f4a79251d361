"""Texts of prompts, as a processor expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.errors import InputError, UnsupportedError
from tokenprune.utils.arguments import shown, unicode_problem
from tokenprune_adapters.hf.families import FAMILIES


class Prompts:
    """Puts prompts into the chat template, or checks the placeholders written in them.

    Args:
        processor: the model's processor.
        model: the model.
        name: of the model, for messages.
    """

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        self._processor, self._name = processor, name
        self._image_id: int = model.config.image_token_id
        self._model_type: str = model.base_model.config.model_type

    @property
    def placeholder(self) -> str:
        """What stands for an image in a prompt."""
        names = ("image_placeholder_token", "image_token")  # Qianfan-OCR's processor has both
        return str(next(filter(None, (getattr(self._processor, name, None) for name in names)), "<image>"))

    def text(self, prompt: Any, images: int) -> str:
        """The text of a prompt about this many images.

        Raises:
            InputError: not a text, or an empty one; as many placeholders as there are no images; image tokens, which
                the processor writes itself; a chat template that leaves the prompt out.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {shown(prompt)} found, expected a text about the image")
        problem = unicode_problem(prompt)
        if problem:
            raise InputError(f"prompt {prompt[:60]!a} {problem}")
        token: str | None = self._processor.tokenizer.convert_ids_to_tokens(self._image_id)  # of a piece of an image
        if token and token != self.placeholder and token in prompt:
            raise InputError(f"the prompt has {token} in it, which the processor writes itself; leave it out")
        written = prompt.count(self.placeholder)
        if written not in (0, images):
            raise InputError(
                f"the prompt has {written} placeholders {self.placeholder}, but there are {images} images; write as "
                "many, or none"
            )
        return prompt if written else self._in_template(prompt, images)

    def options(self, texts: Sequence[str]) -> dict[str, Any]:
        """The processor's arguments for these texts: padding, and no first token where they begin with it.

        Raises:
            InputError: some texts begin with the first token, and others do not.
            UnsupportedError: several texts, and a tokenizer without a padding token.
        """
        tokenizer = self._processor.tokenizer
        begin = tokenizer.bos_token
        begun = [bool(begin) and text.startswith(begin) for text in texts]
        if any(begun) and not all(begun):
            raise InputError(
                f"prompt {begun.index(True)} begins with {begin}, others do not; write it in all, or in none"
            )
        special = {"add_special_tokens": False} if all(begun) else {}
        if len(texts) == 1:
            return special
        if tokenizer.pad_token is None:
            raise UnsupportedError(
                f"{self._name}: its tokenizer has no padding token, which several prompts require; pass one prompt at "
                "a time, or set model.processor.tokenizer.pad_token"
            )
        return {"padding": True, "padding_side": "left", **special}

    def _in_template(self, prompt: str, images: int) -> str:
        own, family = getattr(self._processor, "chat_template", None), FAMILIES.get(self._model_type)
        template = None if own or family is None else family.chat_template
        if not (own or template):
            return self.placeholder * images + prompt
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        text = str(self._processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True))
        if prompt.strip() not in text:
            raise InputError(
                f"{self._name}: its chat template has a text of its own in place of the prompt {shown(prompt)}; "
                f"pass one that is in it: {text[-200:]!r}"
            )
        return text
