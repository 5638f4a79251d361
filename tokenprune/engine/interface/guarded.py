"""A binding that names its adapter in all that goes wrong in the adapter's code, and in nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from tokenprune.core.reads import Read
from tokenprune.engine.interface.bound_model import BoundModel, VisionCapture
from tokenprune.engine.interface.prompt_masks import PromptMasks
from tokenprune.errors import PluginError, PluginWarning, TokenPruneError
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry


class Guarded(BoundModel):
    """What an adapter answered to `bind`, held to its word.

    Raises:
        PluginError: from every method where the adapter's one raises an unexpected exception, or answers with
            something else than it should; names the adapter and its package.
    """

    def __init__(self, inner: BoundModel, entry: Entry) -> None:
        self._inner, self._entry = inner, entry
        with entry.running("bind"):
            self.name, self.decoder, self.tower_layers = inner.name, inner.decoder, inner.tower_layers
        if not isinstance(self.decoder, nn.Module):
            raise entry.refusal(f"binds the decoder {self.decoder!r}, expected a torch.nn.Module")
        self.source = f"adapter {entry.name!r} of package {entry.distribution!r}"

    def offers(self) -> frozenset[type[Read]]:
        """What the adapter's binding offers."""
        with self._entry.running("offers"):
            found: Any = self._inner.offers()
            kinds = frozenset(found)
        if not all(isinstance(kind, type) and issubclass(kind, Read) for kind in kinds):
            problem = f"answers offers() with {found!r}, expected kinds of reads such as {{TowerFeatures}}"
            raise self._entry.refusal(problem)
        return kinds

    def capture(self, reads: Collection[Read]) -> AbstractContextManager[VisionCapture]:
        """The adapter's watch; what is raised while it is open is the caller's, and goes on as it is."""
        return _Watching(self._inner, self._entry, reads, self.source)


class _Watching(AbstractContextManager[VisionCapture]):
    def __init__(self, inner: BoundModel, entry: Entry, reads: Collection[Read], source: str) -> None:
        self._inner, self._entry, self._reads, self._source = inner, entry, reads, source

    def __enter__(self) -> VisionCapture:
        with self._entry.running("capture"):
            self._open = self._inner.capture(self._reads)
            found: Any = self._open.__enter__()
        if not (hasattr(found, "prompt_masks") and hasattr(found, "provide")):
            self.__exit__(None, None, None)
            problem = f"gives {found!r} in capture(), expected an object with prompt_masks() and provide()"
            raise self._entry.refusal(problem)
        return _Watched(found, self._entry, self._source)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._entry.running("capture"):
                self._open.__exit__(None, None, None)
            return
        try:
            self._open.__exit__(kind, error, trace)  # whatever it answers, the caller's error is not swallowed
        except TokenPruneError:
            raise
        except Exception as wrong:
            if wrong is not error:  # the caller's error is the one to tell
                refusal = self._entry.refusal(f"failed in capture() with {brief(wrong)}", "fix or uninstall it")
                warnings.warn(str(refusal), PluginWarning, stacklevel=2)


class _Watched:
    """What a watch saw, with the adapter's name on its failures."""

    def __init__(self, inner: VisionCapture, entry: Entry, source: str) -> None:
        self._inner, self._entry, self._source = inner, entry, source

    def prompt_masks(self, queries: Mapping[str, Tensor]) -> PromptMasks:
        with self._running("prompt_masks"):
            found: Any = self._inner.prompt_masks(queries)
        if not isinstance(found, PromptMasks):
            problem = f"answers prompt_masks() with {type(found).__name__}, expected tokenprune.engine.PromptMasks"
            raise self._entry.refusal(problem)
        if not isinstance(found.queries, Mapping):
            raise self._entry.refusal(f"answers prompt_masks() with queries {found.queries!r}, expected masks by name")
        return replace(found, source=self._source)

    def later(self) -> Tensor | None:
        ask = getattr(self._inner, "later", None)
        if ask is None:
            return None
        with self._running("later"):
            found: Tensor | None = ask()
        return found

    def padding(self) -> Tensor | None:
        ask = getattr(self._inner, "padding", None)
        if ask is None:
            return None
        with self._running("padding"):
            found: Tensor | None = ask()
        return found

    def missed(self) -> bool:
        ask = getattr(self._inner, "missed", None)
        if ask is None:
            return False
        with self._running("missed"):
            return bool(ask())

    def provide(self, read: Read) -> Any:
        with self._running("provide"):
            return self._inner.provide(read)

    @contextmanager
    def _running(self, method: str) -> Iterator[None]:
        try:
            with self._entry.running(method):
                yield
        except PluginError as error:  # what calls the model back is told so, but not by name
            if error.plugin:
                raise
            raise self._entry.refusal(f"failed in {method}(): {error}") from error
