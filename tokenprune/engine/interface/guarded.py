"""The border between the engine and an adapter's code: what goes wrong behind it names the adapter."""

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
from tokenprune.errors import PluginError, PluginWarning, TokenPruneError
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry


@contextmanager
def _running(entry: Entry, method: str) -> Iterator[None]:
    """Run a method of an adapter's; what goes wrong in it names the adapter and its package."""
    try:
        with entry.running(method):
            yield
    except PluginError as error:  # what calls the model back is refused by the engine, which does not know by whom
        if error.plugin:
            raise
        raise entry.refusal(f"failed in {method}(): {error}") from error


class Guarded(BoundModel):
    """The bound model of an adapter, with its answers checked.

    Raises:
        PluginError: from every method where the adapter's one raises an unexpected exception, or answers with
            something else than it should; names the adapter and its package.
    """

    def __init__(self, inner: BoundModel, entry: Entry) -> None:
        self._inner, self._entry = inner, entry
        with _running(entry, "bind"):
            self.name, self.decoder, self.tower_layers = inner.name, inner.decoder, inner.tower_layers
        if not isinstance(self.decoder, nn.Module):
            raise entry.refusal(f"binds the decoder {self.decoder!r}, expected a torch.nn.Module")
        self.source = f"adapter {entry.name!r} of package {entry.distribution!r}"

    def offers(self) -> frozenset[type[Read]]:
        """See `BoundModel.offers`."""
        with _running(self._entry, "offers"):
            found: Any = self._inner.offers()
            kinds = frozenset(found)
        if not all(isinstance(kind, type) and issubclass(kind, Read) for kind in kinds):
            problem = f"answers offers() with {found!r}, expected kinds of reads such as {{TowerFeatures}}"
            raise self._entry.refusal(problem)
        return kinds

    @contextmanager
    def capture(self, reads: Collection[Read]) -> Iterator[VisionCapture]:
        """The adapter's capture; what the caller raises while it is open goes on as it is."""
        with _running(self._entry, "capture"):
            opened = self._inner.capture(reads)
            found: Any = opened.__enter__()
        try:
            if not isinstance(found, VisionCapture):
                problem = f"gives {found!r} in capture(), expected a tokenprune.engine.VisionCapture"
                raise self._entry.refusal(problem)
            yield _GuardedCapture(found, self._entry, self.source)
        except BaseException as error:
            self._close_after(opened, error)
            raise
        with _running(self._entry, "capture"):
            opened.__exit__(None, None, None)

    def _close_after(self, opened: AbstractContextManager[Any], error: BaseException) -> None:
        try:
            opened.__exit__(type(error), error, error.__traceback__)  # whatever it answers, the error is not swallowed
        except TokenPruneError:
            raise
        except Exception as wrong:
            if wrong is not error:  # the caller's error is the one to raise
                refusal = self._entry.refusal(f"failed in capture() with {brief(wrong)}", "fix or uninstall it")
                warnings.warn(str(refusal), PluginWarning, stacklevel=2)


class _GuardedCapture(VisionCapture):
    def __init__(self, inner: VisionCapture, entry: Entry, source: str) -> None:
        self._inner, self._entry, self._source = inner, entry, source

    def _ask(self, method: str, *arguments: Any) -> Any:
        with _running(self._entry, method):
            return getattr(self._inner, method)(*arguments)

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        found: Any = self._ask("prompt_masks", queries)
        if not isinstance(found, PromptMasks):
            problem = f"answers prompt_masks() with {type(found).__name__}, expected tokenprune.engine.PromptMasks"
            raise self._entry.refusal(problem)
        if not isinstance(found.queries, Mapping):
            raise self._entry.refusal(f"answers prompt_masks() with queries {found.queries!r}, expected masks by name")
        return replace(found, source=self._source)

    def provide(self, read: Read) -> Any:
        return self._ask("provide", read)

    def later(self) -> Tensor | None:
        found: Tensor | None = self._ask("later")
        return found

    def missed(self) -> bool:
        return bool(self._ask("missed"))

    def padding(self) -> Tensor | None:
        found: Tensor | None = self._ask("padding")
        return found
