"""`embed`: the image embeddings that a strategy keeps, for runtimes that take embeddings instead of a picture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokenprune.core.scheduling.state import spread_rows
from tokenprune.core.stage import Shape, declared_stages
from tokenprune.core.strategy import Strategy, checked_strategy
from tokenprune.engine.calls.interception import shadowed
from tokenprune.engine.decoder import find_decoder
from tokenprune.engine.interface.bound_model import arguments
from tokenprune.engine.interface.compatibility import declaration_of, shape_on
from tokenprune.engine.interface.turns import model_turn
from tokenprune.engine.pruning import prune
from tokenprune.errors import IncompatibleError, InputError, OptionError, UnsupportedError
from tokenprune.utils.arguments import shown


@runtime_checkable
class EmbeddingModel(Protocol):
    """A vision-language model with its processor, as `tokenprune.load` gives for those of transformers."""

    name: str
    model: nn.Module

    def inputs(self, image: Any, prompt: str) -> Any:
        """The model's inputs for a prompt about an image."""


class _Embedded(Exception):
    """The first layer has its input: nothing after it is needed."""


@torch.inference_mode()
def embed(model: EmbeddingModel, image: Any, strategy: Strategy, question: str) -> Tensor:
    """The image embeddings that a strategy keeps, [kept, width of the decoder], in their order, merged ones included.

    They are what enters the first decoder layer; the decoder is not run. A runtime such as vLLM that takes embeddings
    puts them into its own prompt, and numbers them one after the other: the answer is that of this package with the
    position policy `renumber`, whatever the strategy's default is.

    Args:
        model: a vision-language model from `tokenprune.load`.
        image: one image, as for `answer`.
        strategy: one that prunes before the decoder only, or not at all.
        question: the text, which some strategies compare with the image.

    Raises:
        IncompatibleError: the strategy prunes inside the decoder, or requires a read that the model does not provide.
        OptionError: `strategy` is not a strategy, or was given `positions="keep"`, which embeddings cannot carry.
        UnsupportedError: the model computes positions from an image's grid, which kept tokens no longer have, scales
            embeddings before its first layer, or adds visual features between its layers.
        InputError: another kind of model, several images, not an image, an empty question.

    Examples:
        >>> import tempfile, numpy as np, tokenprune as tp
        >>> from tokenprune.testing.tiny_checkpoints import write_tiny_llava
        >>> model = tp.load(write_tiny_llava(tempfile.mkdtemp()))
        >>> picture = np.zeros((32, 32, 3), np.uint8)
        >>> tp.embed(model, picture, tp.strategy("divprune", budget=0.25), "What is it?").shape
        torch.Size([16, 32])
    """
    checked_strategy(strategy)
    if not isinstance(model, EmbeddingModel):
        raise InputError(
            f"model={shown(model)} found, expected a vision-language model, as tokenprune.load gives for those of "
            "transformers; others have no embeddings that a runtime takes"
        )
    if isinstance(image, (list, tuple)):
        raise InputError(f"{len(image)} images in a list found, expected one image; call embed for each")
    if not isinstance(question, str):
        raise InputError(f"question={shown(question)} found, expected one text")
    parts: Any = getattr(strategy, "parts", (strategy,))
    if any(part.options.model_dump(exclude_unset=True).get("positions") == "keep" for part in parts):
        raise OptionError(
            f"strategy {strategy.name!r}: positions='keep' has no effect on embeddings, which are numbered where they "
            "are used; leave it out"
        )
    declared = declaration_of(model.model)
    decoder = find_decoder(declared.decoder)
    if decoder.multimodal_rope:
        raise UnsupportedError(
            f"model {model.name!r} computes positions from an image's grid, which kept tokens no longer have; choose a "
            "model whose positions are plain numbers, such as LLaVA"
        )
    shape = shape_on(declared, decoder)
    _check_stages(strategy, shape)  # before anything runs, and again once the number of tokens is known
    given: list[Tensor] = []
    entered: list[Tensor] = []

    def whole(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("deepstack_features") is not None:
            raise UnsupportedError(
                f"model {model.name!r} adds visual features between the layers of its decoder, which embeddings do not "
                "carry; choose another model, such as LLaVA"
            )
        given.append(arguments(decoder.module, args, kwargs)["inputs_embeds"])
        return original(*args, **kwargs)

    def first_layer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _Embedded

    with model_turn(model.model):
        inputs = model.inputs(image, question)
        with ExitStack() as stack:
            # These are opened before the engine's, and so called after them: with the shortened sequence.
            stack.enter_context(shadowed(decoder.module, "forward", whole))
            stack.enter_context(shadowed(decoder.layers[0], "forward", first_layer))
            run = stack.enter_context(prune(model.model, strategy))
            with suppress(_Embedded):
                model.model(**inputs)
            trace = run.trace
    assert trace is not None
    _check_stages(strategy, replace(shape, image_tokens=int(trace.exists.sum())))
    layout, states = trace.layout.on_host, entered[0][0]
    kept = spread_rows(trace.active(0).cpu(), layout.slots, layout.image_tokens.shape[1])[0]
    text = layout.valid[0] & ~layout.image_tokens[0]
    is_image = kept[text | kept]
    if not torch.equal(states[~is_image], given[0][0][text]):
        raise UnsupportedError(
            f"model {model.name!r} changes embeddings before the first layer of its decoder, so that what enters it is "
            "not what a runtime takes; choose another model"
        )
    return states[is_image].clone()


def _check_stages(strategy: Strategy, shape: Shape) -> None:
    inside = next((stage for stage in declared_stages(strategy.bind(shape), shape) if stage.layer > 0), None)
    if inside is not None:
        raise IncompatibleError(
            f"strategy {strategy.name!r} prunes inside the decoder (stage {inside.name!r} at layer {inside.layer}); "
            "embeddings are what enters layer 0: choose one that prunes before it, such as divprune"
        )
