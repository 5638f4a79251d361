"""One batch of images through the towers, the decoder and the mask head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, EngineError, InputError, PluginError, TokenPruneError
from tokenprune.utils.stopwatch import stage
from tokenprune_adapters.segmentation.data import Answered, Segmentation, SegmenterInputs
from tokenprune_adapters.segmentation.drafts import AnswerDrafts
from tokenprune_adapters.segmentation.many.joined import joined
from tokenprune_adapters.segmentation.sam.masks import MaskSize

if TYPE_CHECKING:
    from tokenprune_adapters.segmentation.segmenter import Segmenter

OF_ONE_IMAGE = (InputError, BudgetError, EngineError, PluginError)
"""Errors that may concern one image of many; others, such as IncompatibleError, concern all."""
PADDING = 0.1  # share of a prefill's positions that may be padding, before rows are put into another prefill (ours)


@dataclass(frozen=True)
class Settings:
    """The arguments of `Segmenter.segment_many` that are the same for all images."""

    strategy: Strategy | None
    answer: Literal["forced", "generate"]
    max_new_tokens: int
    draft: AnswerDrafts
    batch_size: int
    mask_size: MaskSize
    keep_logits: bool


@dataclass(frozen=True)
class Ready:
    """One image and its queries, ready for the towers.

    Args:
        query: as the user gave it.
        prompts: whole prompts.
        prepared: from `Segmenter.prepare_image`, or what `Segmenter.encode_image` returned.
    """

    query: str | list[str]
    prompts: list[str]
    prepared: Any

    @property
    def queries(self) -> list[str]:
        """The queries as a list."""
        return [self.query] if isinstance(self.query, str) else self.query


@torch.inference_mode()
def run_batch(model: Segmenter, images: Sequence[Ready], settings: Settings) -> list[Segmentation | TokenPruneError]:
    """The result of each image, or the error that concerns it alone.

    The towers run once on all images. The decoder runs on groups of images whose prompts have similar lengths. If a
    group fails, each of its images is run by itself, so that only those at fault fail.
    """
    found: list[Segmentation | TokenPruneError | None] = [None] * len(images)
    inputs: dict[int, SegmenterInputs] = {}
    for number, (image, encoded) in enumerate(zip(images, _encoded(model, images), strict=True)):
        try:
            inputs[number] = model.inputs_of(image.prompts, encoded, settings.answer == "generate", image.queries)
        except InputError as error:
            found[number] = error
    for group in _by_length(inputs, settings.batch_size):
        try:
            results: Sequence[Segmentation | TokenPruneError] = _run(model, group, images, inputs, settings)
        except OF_ONE_IMAGE as error:
            results = [error] if len(group) == 1 else [_alone(model, one, images, inputs, settings) for one in group]
        for number, result in zip(group, results, strict=True):
            found[number] = result
    return [result for result in found if result is not None]


def _encoded(model: Segmenter, images: Sequence[Ready]) -> list[Any]:
    """The images after the towers, which run on those that are not encoded yet."""
    prepared = [image.prepared for image in images if isinstance(image.prepared, model.prepared_type)]
    fresh = iter(model.encode_prepared(prepared) if prepared else ())
    return [next(fresh) if isinstance(image.prepared, model.prepared_type) else image.prepared for image in images]


def _alone(
    model: Segmenter, number: int, images: Sequence[Ready], inputs: dict[int, SegmenterInputs], settings: Settings
) -> Segmentation | TokenPruneError:
    try:
        return _run(model, [number], images, inputs, settings)[0]
    except OF_ONE_IMAGE as error:
        return error


def _by_length(inputs: dict[int, SegmenterInputs], most_rows: int) -> list[list[int]]:
    """Numbers of images whose rows run together: of similar length, and at most `most_rows`, except for one image."""
    length = {number: part.sequence.token_ids.shape[1] for number, part in inputs.items()}
    rows = {number: len(part.prompts) for number, part in inputs.items()}
    groups: list[list[int]] = []
    for number in sorted(inputs, key=lambda number: (length[number], number)):
        together = [*groups[-1], number] if groups else [number]
        total = sum(rows[one] for one in together)
        filled = sum(rows[one] * length[one] for one in together)
        if groups and total <= most_rows and filled >= (1 - PADDING) * total * length[number]:
            groups[-1] = together
        else:
            groups.append([number])
    return groups


def _run(
    model: Segmenter,
    group: Sequence[int],
    images: Sequence[Ready],
    inputs: dict[int, SegmenterInputs],
    settings: Settings,
) -> list[Segmentation]:
    """Results of images whose rows run in one prefill, in order of the group."""
    generate = settings.answer == "generate"
    parts = [inputs[number] for number in group]
    with model.pruned(settings.strategy):
        answered = model.answer(
            joined(parts, model.tokenizer.pad_id, generate),
            max_new_tokens=settings.max_new_tokens if generate else None,
            draft=settings.draft,
        )
    ends = list(accumulate(len(part.prompts) for part in parts))
    owners = [next(owner for owner, end in enumerate(ends) if row < end) for row in answered.rows]
    with stage("mask decoder"):
        low_res, scores = model.low_res_logits_of(answered.states, [part.encoded for part in parts], owners)
    results, first = [], 0  # first mask of the image; masks are in order of rows
    for owner, (number, part, end) in enumerate(zip(group, parts, ends, strict=True)):
        masks = slice(first, first + owners.count(owner))
        first = masks.stop
        own = _of_rows(answered, masks, range(end - len(part.prompts), end), len(model.seg_tokens))
        said = model.texts(part, own, settings.answer)
        query = images[number].query
        result = model.masks_of(
            own,
            part,
            said[0] if isinstance(query, str) else said,
            drawn=(low_res[masks], scores[masks]),
            size=settings.mask_size,
            keep_logits=settings.keep_logits,
        )
        before = end - len(part.prompts)  # rows of the trace
        result = model.by_query(result, query, settings.answer)
        rows = [row + before for row in own.rows]
        results.append(replace(result, row_index=rows, prompt_rows=list(range(before, end))))
    return results


def _of_rows(answered: Answered, masks: slice, rows: range, group: int) -> Answered:
    """The part of the answers that concerns some consecutive rows, numbered from 0, and their masks."""
    return Answered(
        states=answered.states[masks.start * group : masks.stop * group],
        rows=[row - rows.start for row in answered.rows[masks]],
        places=answered.places[masks],
        said=answered.said[rows.start : rows.stop],
        trace=answered.trace,
    )
