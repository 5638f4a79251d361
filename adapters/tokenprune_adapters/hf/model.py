"""A loaded vision-language model with its processor: image and text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, overload

import torch
from PIL.Image import Image

from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.core.trace import Trace
from tokenprune.engine import PruningRun, model_turn, open_run, prune
from tokenprune.engine.decoder import rotary_parameters
from tokenprune.errors import InputError, UnsupportedError
from tokenprune.utils.arguments import shown, unicode_problem, whole_number
from tokenprune.utils.images import ImageInput, to_rgb
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.common.context_length import check_length
from tokenprune_adapters.hf.conversations import Conversations
from tokenprune_adapters.hf.families import FAMILIES
from tokenprune_adapters.hf.processor import asked_of, check_image_tokens, check_images, load_processor, on_device

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "use_mtp": False,
    "token_healing": False,
    **dict.fromkeys(
        (
            "assistant_early_exit",
            "constraints",
            "dola_layers",
            "force_words_ids",
            "guidance_scale",
            "max_time",
            "penalty_alpha",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
            "stop_strings",
        )
    ),
}
"""Arguments of `generate` that override a checkpoint's generation_config: one greedy answer for each prompt, as ids."""


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer of the model.

    Attributes:
        text: the generated text.
        trace: trace of the prefill, if it was pruned by a strategy or a surrounding context; else None. Answers of a
            batch share it.
        row: the answer's batch row in the trace.
    """

    text: str
    trace: Trace | None = None
    row: int = 0

    def __repr__(self) -> str:
        """The text and the tokens, without tensors."""
        tokens = "None, nothing was pruned" if self.trace is None else self.trace.summary(self.row)
        return f"Answer:\n  .text: {self.text!r}\n  .trace: row {self.row}: {tokens}"


class VisionLanguageModel:
    """A model of transformers and its processor, as `tokenprune.load` returns them.

    `inputs` and `answer` may be called from any thread; calls take turns.

    Args:
        model: the model with its language-modelling head; `tokenprune.prune` accepts it or this object.
        source: folder or hub id of the processor, which is loaded on first use.
        name: name in reports.
        revision: revision of a hub id.
    """

    def __init__(self, model: Any, source: str, name: str, revision: str | None = None) -> None:
        self.model, self.source, self.name, self.revision = model, source, name, revision

    def __repr__(self) -> str:
        """The model, its device, and the methods to call."""
        return (
            f"{type(self).__name__} {self.name!r}: {type(self.model).__name__} on {self.model.device}\n"
            "  .answer(image, prompt, strategy), .inputs(image, prompt), .model, .processor"
        )

    @property
    def base_model(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @cached_property
    def processor(self) -> Any:
        """The model's processor; without torchvision it does not support videos.

        Raises:
            CheckpointError: the folder contains none, or it requires a package that is not installed.
        """
        return load_processor(self.source, self.model.config, self.revision)

    def inputs(self, image: ImageInput | Sequence[ImageInput], prompt: str | Sequence[str]) -> Any:
        """The model's inputs on its device, with one batch row for each prompt.

        Args:
            image: one, or several for one prompt: paths, PIL images, arrays or tensors. With a list of prompts, an
                image (or a list of images) for each, or a single image for all.
            prompt: text that is inserted into the chat template, or that contains the model's image placeholder and is
                used unchanged. A list with a single prompt applies to every image. Rows are padded on the left.

        Raises:
            InputError: not an image; an empty prompt; a number of placeholders or prompts that differs from the number
                of images; a prompt with image tokens, which the processor writes itself, or that the chat template
                leaves out; a prompt longer than the model's context.
            UnsupportedError: several prompts, and a tokenizer without a padding token.
        """
        rows = [self._row(*row) for row in _rows(image, prompt)]
        texts, images = [text for text, _ in rows], [pictures for _, pictures in rows]
        padding = {} if len(rows) == 1 else self._padding()
        processor = self.processor
        options = {"return_tensors": "pt", **padding, **self._special(texts), **asked_of(processor)}
        # GOT-OCR 2 takes a nested list for the pages of a document
        given: Any = list(chain(*images)) if hasattr(processor, "multi_page") else images
        try:
            with model_turn(self.model):  # fast tokenizers are not thread-safe
                made = processor(text=texts, images=given, **options)
        except Exception as error:  # the exceptions of processors differ between families
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(processor).__name__} cannot prepare images of {_sizes(chain(*images))} pixels and these "
                f"prompts ({type(error).__name__}: {reason}); resize or crop them, or change the prompts"
            ) from error
        config = self.model.config.get_text_config()
        ids = made["input_ids"]
        sizes = [_sizes(some) for some in images]
        check_image_tokens(made, self.model.config, processor, sizes, self._placeholder())
        check_images(made, self.model.config, sizes)
        # with axes of time, height and width an image has fewer positions than tokens
        if any(len((rope or {}).get("mrope_section") or ()) == 3 for rope in rotary_parameters(config)):
            check_length(config, int((ids != self.model.config.image_token_id).sum(1).max()))
        else:
            check_length(config, ids.shape[1])
        return on_device(made, self.model)

    @overload
    def answer(self, image: Any, prompt: str, strategy: Strategy | None = None, max_new_tokens: int = 64) -> Answer: ...

    @overload
    def answer(
        self, image: Any, prompt: Sequence[str], strategy: Strategy | None = None, max_new_tokens: int = 64
    ) -> list[Answer]: ...

    @torch.inference_mode()
    def answer(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str],
        strategy: Strategy | None = None,
        max_new_tokens: int = 64,
    ) -> Answer | list[Answer]:
        """Greedy answer to a prompt about one or several images; for a list of prompts, a list of answers in one batch.

        Decoding is greedy whatever the checkpoint's generation_config.json says; its settings for single tokens (end of
        sequence, suppressed tokens, penalties) apply.

        Args:
            image: the image or images; see `inputs` for images, prompts and errors.
            prompt: a text, or a list of texts, each of which gets the same answer as alone.
            strategy: a `tokenprune.Strategy`; None runs the model unpruned, or pruned by a context that this thread has
                open.
            max_new_tokens: maximum length of an answer.

        Raises:
            IncompatibleError: the strategy requires a read that the model does not provide.
            OptionError: `max_new_tokens` is below 1, or `strategy` is not a strategy.
        """
        limit = whole_number("max_new_tokens", max_new_tokens, 1)
        if strategy is not None:
            checked_strategy(strategy)
        with model_turn(self.model), Conversations(self.model).separated():
            _ = self.processor  # loaded on first use, which must not be measured as preprocessing
            with stage("preprocess"):
                inputs = self.inputs(image, prompt)
            with stage("generation"), self._pruned(strategy) as run:
                ids = self.model.generate(**inputs, max_new_tokens=limit, **self._greedy())
            trace = None if run is None else run.trace
            texts = [self._answer_text(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        answers = [Answer(text, trace, row) for row, text in enumerate(texts)]
        return answers[0] if isinstance(prompt, str) else answers

    def _pruned(self, strategy: Strategy | None) -> AbstractContextManager[PruningRun | None]:
        return nullcontext(open_run(self.model)) if strategy is None else prune(self.model, strategy)

    def _greedy(self) -> dict[str, Any]:
        """Arguments of `generate` that the installed release of transformers has."""
        return {name: value for name, value in GREEDY.items() if hasattr(self.model.generation_config, name)}

    def _answer_text(self, ids: list[int]) -> str:
        ends = self.model.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((place for place, token in enumerate(ids, 1) if token in stops), len(ids))  # padding follows
        return str(self.processor.decode(ids[:end], skip_special_tokens=True))

    def _row(self, image: Any, prompt: Any) -> tuple[str, list[Image]]:
        """The text of one prompt, and its images."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {shown(prompt)} found, expected a text about the image")
        problem = unicode_problem(prompt)
        if problem:
            raise InputError(f"prompt {prompt[:60]!a} {problem}")
        images = [to_rgb(one) for one in (image if isinstance(image, (list, tuple)) else [image])]
        if not images:
            raise InputError("an empty list of images found, expected one or more")
        placeholder, token = self._placeholder(), self._image_token()
        if token and token != placeholder and token in prompt:
            raise InputError(f"the prompt has {token} in it, which the processor writes itself; leave it out")
        written = prompt.count(placeholder)
        if written not in (0, len(images)):
            raise InputError(
                f"the prompt has {written} placeholders {placeholder}, but there are {len(images)} images; write as "
                "many, or none"
            )
        return prompt if written else self._chat_prompt(len(images), prompt), images

    def _special(self, texts: list[str]) -> dict[str, bool]:
        """Do not add the first token a second time if the template already contains it."""
        begin = self.processor.tokenizer.bos_token
        begun = [bool(begin) and text.startswith(begin) for text in texts]
        if any(begun) and not all(begun):
            raise InputError(
                f"prompt {begun.index(True)} begins with {begin}, others do not; write it in all, or in none"
            )
        return {"add_special_tokens": False} if all(begun) else {}

    def _padding(self) -> dict[str, Any]:
        if self.processor.tokenizer.pad_token is None:
            raise UnsupportedError(
                f"{self.name}: its tokenizer has no padding token, which several prompts require; pass one prompt at a "
                "time, or set model.processor.tokenizer.pad_token"
            )
        return {"padding": True, "padding_side": "left"}

    def _placeholder(self) -> str:
        """What stands for an image in a prompt."""
        names = ("image_placeholder_token", "image_token")  # Qianfan-OCR's processor has both
        return str(next(filter(None, (getattr(self.processor, name, None) for name in names)), "<image>"))

    def _image_token(self) -> str | None:
        """The token of a piece of an image."""
        token: str | None = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        return token

    def _chat_prompt(self, images: int, prompt: str) -> str:
        own, family = getattr(self.processor, "chat_template", None), FAMILIES.get(self.base_model.config.model_type)
        template = None if own or family is None else family.chat_template
        if own or template:
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            text = str(self.processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True))
            if prompt.strip() not in text:
                raise InputError(
                    f"{self.name}: its chat template has a text of its own in place of the prompt {shown(prompt)}; "
                    f"pass one that is in it: {text[-200:]!r}"
                )
            return text
        return self._placeholder() * images + prompt


def _sizes(images: Iterable[Image]) -> str:
    return ", ".join(f"{width}×{height}" for width, height in (one.size for one in images))


def _rows(image: Any, prompt: str | Sequence[str]) -> list[tuple[Any, Any]]:
    """The image or images and the prompt of each batch row."""
    if not isinstance(prompt, (list, tuple)):
        return [(image, prompt)]
    images = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompt)
    prompts = list(prompt) * len(images) if len(prompt) == 1 else list(prompt)
    if not prompts or len(prompts) != len(images):
        raise InputError(
            f"{len(images)} images and {len(prompt)} prompts found; pass a prompt for each image, a list of one for "
            "all, or one image for all prompts (several images of one prompt form a nested list)"
        )
    return list(zip(images, prompts, strict=True))
