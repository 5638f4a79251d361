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
from tokenprune.engine.interface.bound_model import Binding, Watch
from tokenprune.engine.interface.prompt_masks import Marks
from tokenprune.errors import PluginError, PluginWarning, TokenPruneError
from tokenprune.plugins.attribution import brief
from tokenprune.plugins.entries import Entry


class Guarded(Binding):
    """What an adapter answered to `bind`, held to its word.

    Raises:
        PluginError: from every method where the adapter's one raises what is no TokenPruneError, or answers with
            something else than it should; names the adapter and its package.
    """

    def __init__(self, inner: Binding, entry: Entry) -> None:
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

    def watch(self, reads: Collection[Read]) -> AbstractContextManager[Watch]:
        """The adapter's watch; what is raised while it is open is the caller's, and goes on as it is."""
        return _Watching(self._inner, self._entry, reads, self.source)


class _Watching(AbstractContextManager[Watch]):
    def __init__(self, inner: Binding, entry: Entry, reads: Collection[Read], source: str) -> None:
        self._inner, self._entry, self._reads, self._source = inner, entry, reads, source

    def __enter__(self) -> Watch:
        with self._entry.running("watch"):
            self._open = self._inner.watch(self._reads)
            found: Any = self._open.__enter__()
        if not (hasattr(found, "marks") and hasattr(found, "provide")):
            self.__exit__(None, None, None)
            problem = f"gives {found!r} in watch(), expected an object with marks() and provide()"
            raise self._entry.refusal(problem)
        return _Watched(found, self._entry, self._source)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._entry.running("watch"):
                self._open.__exit__(None, None, None)
            return
        try:
            self._open.__exit__(kind, error, trace)  # whatever it answers, the caller's error is not swallowed
        except TokenPruneError:
            raise
        except Exception as wrong:
            if wrong is not error:  # the caller's error is the one to tell
                refusal = self._entry.refusal(f"failed in watch() with {brief(wrong)}", "fix or uninstall it")
                warnings.warn(str(refusal), PluginWarning, stacklevel=2)


class _Watched:
    """What a watch saw, with the adapter's name on its failures."""

    def __init__(self, inner: Watch, entry: Entry, source: str) -> None:
        self._inner, self._entry, self._source = inner, entry, source

    def marks(self, queries: Mapping[str, Tensor]) -> Marks:
        with self._running("marks"):
            found: Any = self._inner.marks(queries)
        if not isinstance(found, Marks):
            problem = f"answers marks() with {type(found).__name__}, expected tokenprune.engine.Marks"
            raise self._entry.refusal(problem)
        if not isinstance(found.queries, Mapping):
            raise self._entry.refusal(f"answers marks() with queries {found.queries!r}, expected masks by name")
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
