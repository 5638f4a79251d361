"""Reads that a plugin defines: any function of what a decoder layer sees.

Examples:
    The view that such a function is given names its tensors:

    >>> import tokenprune as tp
    >>> sorted(tp.LayerView.__dataclass_fields__)[:4]
    ['image_columns', 'key', 'query', 'query_columns']
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.core.reads.base import Read, kinds_of_reads
from tokenprune.errors import PluginError

if TYPE_CHECKING:  # what a strategy requires is known without torch
    from torch import Tensor


@dataclass(frozen=True)
class LayerView:
    """What a decoder layer sees: M columns per row, of text, of the image tokens that are active, and of padding, whose
    values mean nothing. The tensors are the layer's own and must not be modified.

    Attributes:
        states: [batch, M, width], the states that enter the layer, before its norm.
        query: [batch, heads, M, C].
        key: [batch, key heads, M, C]; several heads of the query may share one.
        value: [batch, key heads, M, C].
        scaling: the factor on query · key.
        image_columns: int64 [batch, N], the column of each image token, −1 for one that is not active.
        text_columns: int64 [batch, T], the column of each text token, −1 where a row has fewer.
        query_columns: from the name of query rows, as in `AttentionFrom`, to their columns, int64 [batch, Q].

    Examples:
        Two image tokens in columns 1 and 2 of four; the second is not active:

        >>> import torch, tokenprune as tp
        >>> states, image, text = torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[1, -1]]), torch.tensor([[0, 3]])
        >>> view = tp.LayerView(states, *[states[:, None]] * 3, 1.0, image, text, lambda name: text[:, -1:])
        >>> view.of_image(states).tolist(), view.of_text(states).tolist()
        ([[[1.0], [0.0]]], [[[0.0], [3.0]]])
    """

    states: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    image_columns: Tensor
    text_columns: Tensor
    query_columns: Callable[[str], Tensor]

    def of_image(self, values: Tensor) -> Tensor:
        """Values [batch, M, …] of the image tokens: [batch, N, …], zeros where one is not active.

        Raises:
            PluginError: values of another shape.
        """
        return self._at("of_image", values, self.image_columns)

    def of_text(self, values: Tensor) -> Tensor:
        """Values [batch, M, …] of the text tokens: [batch, T, …], zeros where a row has fewer. Raises as `of_image`."""
        return self._at("of_text", values, self.text_columns)

    def _at(self, method: str, values: Tensor, columns: Tensor) -> Tensor:
        wanted = self.states.shape[:2]
        if values.dim() < 2 or values.shape[:2] != wanted:
            raise PluginError(
                f"{method}() was given {list(values.shape)}; expected [batch = {wanted[0]}, M = {wanted[1]}, …] (move "
                "heads behind the columns, or reduce them)"
            )
        return at_columns(values, columns)


@dataclass(frozen=True)
class LayerRead(Read):
    """A read of your own: a function of what the decoder layer just before the stage sees.

    A subclass is a frozen dataclass, whose fields are its options. It implements `value`, and sets class attributes:
    `field`, the name in `tokens`; if it needs it, `rotary = False`, with which queries and keys of the view are without
    the rotary embedding (they are computed ahead of the layer, which takes time); and, if the value has no axis of
    image tokens, `axis = None`. The engine provides it for every decoder. In a later turn of a conversation the view is
    of the turn's own tokens, without cached keys. Tokens that are not active have zeros from
    `of_image`: in a score of which the smallest wins, mask them.

    Raises:
        PluginError: `field` is missing, no name, or that of another read; `axis` is no axis behind the batch's.

    Examples:
        The norm of the values, as a stage at layer 1 or later can read it:

        >>> from dataclasses import dataclass
        >>> import tokenprune as tp
        >>> @dataclass(frozen=True)
        ... class ValueNorms(tp.LayerRead):
        ...     field = "value_norms"
        ...
        ...     def value(self, layer):
        ...         return layer.of_image(layer.value.norm(dim=-1).mean(1))  # mean over heads: [batch, N]
        >>> tp.Stage("prune", layer=2, tokens=64, reads=(ValueNorms(),)).reads
        (ValueNorms(),)
    """

    present: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    infinite: ClassVar[bool] = True
    rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name, kind = getattr(self, "field", None), type(self).__name__
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            found = "sets no `field`" if name is None else f"has field = {name!r}"
            raise PluginError(f"read {kind} {found}; expected the name of its value in `tokens`, such as 'value_norms'")
        taken = [other for other in kinds_of_reads() if other.field == name and not issubclass(other, LayerRead)]
        if taken:
            raise PluginError(
                f"read {kind} has field = {name!r}, which is that of {taken[0].__name__}; choose another name"
            )
        if self.axis == 0:
            raise PluginError(f"read {kind} has axis = {self.axis}; expected that of image tokens, 1 or later, or None")

    def value(self, layer: LayerView) -> Tensor:
        """The value: [batch, N, …], or anything without a token axis if `axis` is None."""
        raise NotImplementedError(f"{type(self).__name__} does not define value()")


def provides(offers: Collection[type[Read]], kind: type[Read]) -> bool:
    """Whether a kind of read is among those that are offered; with `LayerRead`, all of its subclasses are."""
    return kind in offers or (issubclass(kind, LayerRead) and LayerRead in offers)


def at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Values [batch, M, …] at int64 [batch, n]: [batch, n, …], zeros at −1."""
    from tokenprune.core.scheduling.state import take_rows

    columns = columns.to(values.device)
    taken = take_rows(values, columns.clamp(min=0))
    return taken.masked_fill((columns < 0).reshape(*columns.shape, *[1] * (taken.dim() - 2)), 0)
