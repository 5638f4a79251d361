"""The method of a segmentation model that takes many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from tokenprune.core.strategy import Strategy
from tokenprune.errors import OptionError
from tokenprune.utils.arguments import one_of, shown, whole_number
from tokenprune_adapters.segmentation.drafts import Draft
from tokenprune_adapters.segmentation.many.batch import Settings
from tokenprune_adapters.segmentation.many.stream import ImageResult, stream
from tokenprune_adapters.segmentation.sam import masks as sam_masks

if TYPE_CHECKING:
    from tokenprune_adapters.segmentation.segmenter import Segmenter


class ManyImages:
    """Part of `Segmenter`: `segment_many`."""

    def segment_many(
        self,
        requests: Iterable[tuple[Any, str | Sequence[str]]],
        strategy: Strategy | None = None,
        answer: Literal["forced", "generate"] = "forced",
        *,
        batch_size: int | None = None,
        workers: int = 2,
        mask_size: sam_masks.MaskSize = "image",
        keep_logits: bool = False,
        on_error: Literal["return", "raise"] = "return",
        max_new_tokens: int = 64,
        draft: Draft = True,
    ) -> Iterator[ImageResult]:
        """Masks for many images, each with its own query or queries, in order.

        The masks are those of `segment`, to the precision of the arithmetic. Pictures are read ahead in threads; the
        towers run on `batch_size` images at once, the decoder on those of them whose prompts have similar lengths.
        Whatever the number of requests, at most `2 · batch_size + 1` pictures are in memory, and the results of one
        batch. Closing the iterator (or Ctrl-C) ends the threads.

        Args:
            requests: pairs (image, query) or (image, [query, …]), from a list or a generator; taken one by one. Images
                are as in `segment`.
            strategy: as in `segment`.
            answer: as in `segment`.
            batch_size: images per run of the towers, and largest number of rows of a prefill (an image with more
                queries has one of its own). None = 8, or 2 on a CPU, where larger batches save nothing.
            workers: threads that read pictures.
            mask_size: "image", (height, width) in pixels for another size of the whole image, or "low" for the masks
                as the mask head makes them, over its padded square input, which costs no resizing.
            keep_logits: whether results have `mask_logits`, which are four times as large as masks.
            on_error: "return" gives a result with the error for an image or query that cannot be used, and continues;
                "raise" raises it.
            max_new_tokens, draft: as in `segment`.

        Returns:
            An iterator of `ImageResult`: `index`, `image`, and `result` (as from `segment`) or `error`. The images of a
            prefill share its `trace`; `row_index` gives the row of each mask in it.

        Raises:
            OptionError, InputError: an argument is not as described; raised at once.
            IncompatibleError: the strategy is incompatible with the model; raised at once.

        Examples:
            >>> import numpy as np, tokenprune as tp
            >>> model = tp.load("lisa-tiny")
            >>> pairs = [(np.zeros((24, 32, 3), np.uint8), "the red ring"), ("nowhere.png", "the star")]
            >>> for done in model.segment_many(pairs, mask_size=(12, 16)):
            ...     print(done.index, done.error or done.result.masks.shape)
            0 torch.Size([1, 12, 16])
            1 image 'nowhere.png': no such file; check the path
        """
        one_of("answer", answer, ("forced", "generate"))
        one_of("on_error", on_error, ("return", "raise"))
        whole_number("workers", workers, 1)
        if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
            raise OptionError(f"requests={shown(requests)} found, expected pairs (image, query)")
        model = cast("Segmenter", self)
        settings = Settings(
            strategy=strategy,
            answer=answer,
            max_new_tokens=whole_number("max_new_tokens", max_new_tokens, 1),
            draft=model.expected(draft),
            batch_size=_usual_batch(model) if batch_size is None else whole_number("batch_size", batch_size, 1),
            mask_size=sam_masks.checked_mask_size(mask_size),
            keep_logits=bool(keep_logits),
        )
        with model.pruned(strategy):  # incompatible strategies are refused before a picture is read
            pass
        return stream(model, requests, settings, workers, on_error == "raise")


def _usual_batch(model: Segmenter) -> int:
    # On a CPU, in benchmarks, a batch of 2 was never slower than single images, and one of 8 sometimes was.
    return 2 if next(model.tower.parameters()).device.type == "cpu" else 8
