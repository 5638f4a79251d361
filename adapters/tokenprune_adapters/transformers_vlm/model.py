"""A loaded vision-language model with its processor: an image and words in, words out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tokenprune.base import Strategy
from tokenprune.engine import prune
from tokenprune.errors import InputError, OptionError
from tokenprune.trace import Trace
from tokenprune_adapters.images import ImageInput, to_rgb
from tokenprune_adapters.transformers_vlm.processing import load_processor


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the new text.
        trace: what the strategy did in the prefill; None without one.
    """

    text: str
    trace: Trace | None = None


class VisionLanguageModel:
    """A model of transformers and its processor, as `tokenprune.load` gives them.

    Args:
        model: the model with its language-modelling head; `tokenprune.prune` takes it, or this object.
        source: folder or hub id that the processor is read from when it is first needed.
        name: shown in reports.
        revision: of a hub id.
    """

    def __init__(self, model: Any, source: str, name: str, revision: str | None = None) -> None:
        self.model, self.source, self.name, self.revision = model, source, name, revision

    @property
    def base_model(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @cached_property
    def processor(self) -> Any:
        """The processor that belongs to the model; without torchvision it takes no videos.

        Raises:
            CheckpointError: the folder holds none, or one that needs a package that is not installed.
        """
        return load_processor(self.source, self.model.config, self.revision)

    def inputs(self, image: ImageInput | Sequence[ImageInput], prompt: str) -> Any:
        """What the model is called with, on its device.

        Args:
            image: one, or several for one prompt: paths, PIL images, arrays or tensors.
            prompt: the user's words, put into the chat template; or a text that holds the model's own image
                placeholder, taken as it is.

        Raises:
            InputError: something that is no image, an empty prompt, or one with placeholders for more or fewer images.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {prompt!r} found, expected words about the image")
        images = [to_rgb(one) for one in (image if isinstance(image, (list, tuple)) else [image])]
        if not images:
            raise InputError("an empty list of images found, expected one or more")
        placeholder = self._placeholder()
        written = prompt.count(placeholder)
        if written not in (0, len(images)):
            raise InputError(
                f"the prompt has {written} placeholders {placeholder}, but there are {len(images)} images; write as "
                "many, or none"
            )
        text = prompt if written else self._asked(len(images), prompt)
        begin = self.processor.tokenizer.bos_token
        once = {"add_special_tokens": False} if begin and text.startswith(begin) else {}  # as some templates write it
        processor = self.processor
        try:
            made = processor(text=[text], images=[images], return_tensors="pt", **once)
        except Exception as error:  # what a processor raises on odd sizes differs from family to family
            sizes = ", ".join(f"{width}×{height}" for width, height in (one.size for one in images))
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(processor).__name__} cannot prepare images of {sizes} pixels and this prompt "
                f"({type(error).__name__}: {reason}); resize or crop them, or change the prompt"
            ) from error
        return made.to(self.model.device)

    @torch.inference_mode()
    def answer(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str,
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
    ) -> Answer:
        """Greedy answer to a prompt about one image or several; see `inputs` for them and the errors.

        Args:
            image: the image or images.
            prompt: the user's words.
            strategy: a `tokenprune.Strategy`; None leaves the model untouched.
            max_new_tokens: limit of the answer.

        Raises:
            IncompatibleError: the strategy reads what the model does not offer.
            OptionError: no new tokens allowed.
        """
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={max_new_tokens} found, expected at least 1")
        inputs = self.inputs(image, prompt)
        with nullcontext() if strategy is None else prune(self.model, strategy) as run:
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return Answer(self.processor.decode(new, skip_special_tokens=True), None if run is None else run.trace)

    def _placeholder(self) -> str:
        return str(getattr(self.processor, "image_token", None) or "<image>")

    def _asked(self, images: int, prompt: str) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        return self._placeholder() * images + prompt
