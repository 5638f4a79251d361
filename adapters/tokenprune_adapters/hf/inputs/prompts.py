"""Texts of prompts, as a processor expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available

from tokenprune.errors import InputError, UnsupportedError
from tokenprune.utils.arguments import shown, unicode_problem
from tokenprune.utils.extras import install_extra
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

    def video_processor(self) -> Any:
        """The processor of videos.

        Raises:
            UnsupportedError: the family takes no videos, or the processor has no part for them.
        """
        family = FAMILIES.get(self._model_type)
        if family is None or family.videos is None:
            title = family.title if family else self._model_type
            raise UnsupportedError(f"{self._name}: videos of {title} are not supported; pass frames as images")
        found = getattr(self._processor, "video_processor", None)
        if found is None:
            known = getattr(self._processor, "without_videos", "")  # why it was loaded without them
            cure = f"fetch the checkpoint's files for videos{f' ({known})' if known else ''}"
            if not is_torchvision_available():
                cure = f"transformers makes it with torchvision, which is not installed; {install_extra('video')}"
            raise UnsupportedError(f"{self._name}: its processor has no part for videos: {cure}")
        return found

    def check_kinds(self, images: bool, videos: bool) -> None:
        """Raise UnsupportedError for images and videos in one call if one token marks both."""
        family = FAMILIES.get(self._model_type)
        if images and videos and family is not None and family.one_token:
            raise UnsupportedError(
                f"{self._name} got images and videos in one call, but one token marks both; ask about them one by one"
            )

    def visual(self, ids: Tensor, videos: bool) -> Tensor:
        """Where the tokens of images, and of videos if there are any, are: bool, of the shape of `ids`."""
        found = ids == self._image_id
        token: int | None = getattr(self._processor, "video_token_id", None)
        return found | (ids == token) if videos and token is not None else found

    def text(self, prompt: Any, images: int, videos: int = 0) -> str:
        """The text of a prompt about this many images and videos.

        Raises:
            InputError: not a text, or an empty one; a number of placeholders other than that of images and videos;
                image tokens, which the processor writes itself; a chat template that leaves out the prompt or the
                videos.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {shown(prompt)} found, expected a text about the image")
        problem = unicode_problem(prompt)
        if problem:
            raise InputError(f"prompt {prompt[:60]!a} {problem}")
        token: str | None = self._processor.tokenizer.convert_ids_to_tokens(self._image_id)  # of a piece of an image
        if token and token != self.placeholder and token in prompt:
            raise InputError(f"the prompt has {token} in it, which the processor writes itself; leave it out")
        kinds = [("images", self.placeholder, images)]
        if self._video_token:
            kinds.append(("videos", self._video_token, videos))
        if not any(placeholder in prompt for _, placeholder, _ in kinds):
            return self._in_template(prompt, images, videos)
        for what, placeholder, count in kinds:
            written = prompt.count(placeholder)
            if written != count:
                raise InputError(
                    f"the prompt has {written} placeholders {placeholder}, but there are {count} {what}; write as "
                    "many, or none"
                )
        return prompt

    @property
    def _video_token(self) -> str | None:
        """What stands for a video in a prompt; None if the processor knows none."""
        return getattr(self._processor, "video_token", None)

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

    def _in_template(self, prompt: str, images: int, videos: int) -> str:
        own, family = getattr(self._processor, "chat_template", None), FAMILIES.get(self._model_type)
        template = None if own or family is None else family.chat_template
        if not (own or template):
            return self.placeholder * images + (self._video_token or "") * videos + prompt
        seen = [{"type": "image"}] * images + [{"type": "video"}] * videos
        turns = [{"role": "user", "content": [*seen, {"type": "text", "text": prompt}]}]
        text = str(self._processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True))
        if prompt.strip() not in text:
            raise InputError(
                f"{self._name}: its chat template has a text of its own in place of the prompt {shown(prompt)}; "
                f"pass one that is in it: {text[-200:]!r}"
            )
        if videos and text.count(str(self._video_token)) != videos:
            raise InputError(
                f"{self._name}: its chat template leaves out videos; write the prompt with {self._video_token} for each"
            )
        return text
