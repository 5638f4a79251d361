"""The bound model of a live model, whose results are checked: each error names the adapter and its package."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokenprune.core.reads import Read
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.errors import (
    InputError,
    OptionError,
    PluginError,
    PluginWarning,
    TokenPruneError,
    UnsupportedError,
)
from tokenprune.loading.model_support import refusal_of
from tokenprune.plugins import registry
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry, not_loaded
from tokenprune.utils.arguments import shown


@contextmanager
def _attributed(entry: Entry, method: str) -> Iterator[None]:
    """Run a method of an adapter; errors in it name the adapter and its package."""
    try:
        with entry.running(method):
            yield
    except PluginError as error:  # raised by the engine, without a name, if the adapter calls the model
        if error.plugin:
            raise
        raise entry.refusal(f"failed in {method}(): {error}") from error


class CheckedBoundModel(BoundModel):
    """The bound model of an adapter, with checked results.

    Raises:
        PluginError: from every method, if the adapter's method raises an unexpected exception or returns an object of
            the wrong type; names the adapter and its package.
    """

    def __init__(self, inner: BoundModel, entry: Entry) -> None:
        self._inner, self._entry = inner, entry
        with _attributed(entry, "bind"):
            self.name, self.decoder, self.tower_layers = inner.name, inner.decoder, inner.tower_layers
        if not isinstance(self.decoder, nn.Module):
            raise entry.refusal(f"has the decoder {self.decoder!r}, expected a torch.nn.Module")
        self.source = f"adapter {entry.name!r} of package {entry.distribution!r}"

    def offers(self) -> frozenset[type[Read]]:
        """See `BoundModel.offers`."""
        with _attributed(self._entry, "offers"):
            found: Any = self._inner.offers()
            kinds = frozenset(found)
        if not all(isinstance(kind, type) and issubclass(kind, Read) for kind in kinds):
            problem = f"returned {found!r} from offers(), expected kinds of reads such as {{TowerFeatures}}"
            raise self._entry.refusal(problem)
        return kinds

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """The adapter's capture; exceptions of the caller pass through unchanged."""
        with _attributed(self._entry, "capture"):
            opened = self._inner.capture(reads)
            found: Any = opened.__enter__()
        try:
            if not isinstance(found, VisionCapture):
                problem = f"yielded {found!r} from capture(), expected a tokenprune.engine.VisionCapture"
                raise self._entry.refusal(problem)
            yield _CheckedCapture(found, self._entry, self.source)
        except BaseException as error:
            self._close_after(opened, error)
            raise
        with _attributed(self._entry, "capture"):
            opened.__exit__(None, None, None)

    def _close_after(self, opened: AbstractContextManager[Any], error: BaseException) -> None:
        try:
            opened.__exit__(type(error), error, error.__traceback__)  # its result is ignored: never swallow the error
        except TokenPruneError:
            raise
        except Exception as wrong:
            if wrong is not error:  # the caller's error is raised, this one reported
                refusal = self._entry.refusal(f"failed in capture() with {brief(wrong)}", "fix or uninstall it")
                warnings.warn(str(refusal), PluginWarning, stacklevel=2)


class _CheckedCapture(VisionCapture):
    def __init__(self, inner: VisionCapture, entry: Entry, source: str) -> None:
        self._inner, self._entry, self._source = inner, entry, source

    def _call(self, method: str, *arguments: Any) -> Any:
        with _attributed(self._entry, method):
            return getattr(self._inner, method)(*arguments)

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        found: Any = self._call("prompt_masks", queries)
        if not isinstance(found, PromptMasks):
            problem = f"returned {type(found).__name__} from prompt_masks(), expected tokenprune.engine.PromptMasks"
            raise self._entry.refusal(problem)
        if not isinstance(found.queries, Mapping):
            raise self._entry.refusal(
                f"returned the queries {found.queries!r} from prompt_masks(), expected a dict from names to masks"
            )
        return replace(found, source=self._source)

    def provide(self, read: Read) -> Any:
        return self._call("provide", read)

    def later(self) -> Tensor | None:
        found: Tensor | None = self._call("later")
        return found

    def missed(self) -> bool:
        return bool(self._call("missed"))

    def padding(self) -> Tensor | None:
        found: Tensor | None = self._call("padding")
        return found


def bound_model_of(model: Any) -> BoundModel:
    """Bind a live model with the first installed adapter that supports it; errors name the adapter.

    A `BoundModel` is returned as it is. Adapters are imported and tried in the order of registration, so that the
    result depends only on what is installed; those after the first match are not imported.

    Raises:
        InputError: a plain language model, whose image tokens the caller must mark.
        OptionError: not a model.
        UnsupportedError: no adapter supports the model, or it is pruned through its own `segment`.
        PluginError: an adapter cannot be imported, raises, or returns an object of the wrong type.
    """
    if isinstance(model, BoundModel):
        return model
    asked: dict[str, Any] = {}
    for name, entry in registry.adapters().items():
        asked[name] = entry.load()
        bound = entry.call(model, method="bind")
        if isinstance(bound, BoundModel):
            return CheckedBoundModel(bound, entry)
        if bound is not None:
            raise entry.refusal(f"returned {bound!r} from bind(), expected a BoundModel or None", "fix or uninstall it")
    if hasattr(model, "segment") and not isinstance(model, type):
        raise UnsupportedError(
            f"{type(model).__name__} is pruned through its own methods; call its segment(image, query, strategy=…), or "
            "pass its decoder to tokenprune.prune(), with image_tokens="
        )
    if not isinstance(model, nn.Module):
        name = f", such as tokenprune.load({model!r})" if isinstance(model, str) else ""
        raise OptionError(
            f"model={shown(model)} found, expected a torch.nn.Module or the result of tokenprune.load(){name}"
        )
    config = getattr(model, "config", None)
    refused = refusal_of(getattr(config, "model_type", None))
    if refused:
        raise UnsupportedError(f"{type(model).__name__} {refused}")
    if getattr(config, "vision_config", None) is None:
        raise InputError(
            f"{type(model).__name__}: where are the image tokens? Pass image_tokens=, a bool [batch, sequence] "
            "mask over the decoder's input"
        )
    families = "; ".join(
        f"{name}: {', '.join(adapter.model_types)}" for name, adapter in asked.items() if adapter.model_types
    )
    raise UnsupportedError(
        f"no adapter knows the model {type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}); "
        f"adapters know {families or 'no live models'}; mark its image tokens with image_tokens= to prune it anyway, "
        f"or write an adapter{not_loaded(registry.broken_plugins())}"
    )
