"""Whether the data of a sweep are still those that its records were made of.

Records are kept by the numbers of scenes, so a scene that is added, left out or changed before or among them would make
some count twice and others never. Every stored scene is compared when a sweep goes on.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from tokenprune.datasets.base import Dataset
from tokenprune.datasets.files.dataset import FileDataset, ListedQuery, ListedScene
from tokenprune.datasets.validation import scenes_of
from tokenprune.errors import DataWarning, InputError
from tokenprune.sweeps import fingerprint
from tokenprune.sweeps.entries import DatasetEntry
from tokenprune.sweeps.plan import Group
from tokenprune.sweeps.store import Store, StoredScene

LISTED = 8  # hexadecimal digits of a scene in a listing
PICKLING = (pickle.PicklingError, AttributeError, TypeError, RecursionError)


class Data:
    """A dataset as it is now. One that is read from files is listed once, as a whole, whatever the limit.

    Args:
        entry: of the sweep.
        made: its dataset, if it was made before.
    """

    def __init__(self, entry: DatasetEntry, made: Dataset | None = None) -> None:
        self.entry = entry
        self.dataset: Any = entry.make() if made is None else made
        self._digests: dict[int, str] = {}

    @property
    def is_listed(self) -> bool:
        """Whether it is read from files, which tell all scenes beforehand."""
        return isinstance(self.dataset, FileDataset)

    @property
    def listing(self) -> str:
        """Eight hexadecimal digits for each scene: of its name, and the names and texts of its queries."""
        return self._summary[2]

    @property
    def states(self) -> list[str]:
        """Of each scene, what is cheap to look at: see `state_of`. Empty unless `is_listed`."""
        return self._summary[1]

    @cached_property
    def _summary(self) -> tuple[list[int], list[str], str]:
        """Queries and states of all scenes, and the listing; the annotations are not kept."""
        scenes = self._listed() if self.is_listed else []
        listing = "".join(map(_of_listing, scenes))
        return [len(scene.queries) for scene in scenes], [state_of(scene) for scene in scenes], listing

    def _listed(self) -> list[ListedScene]:
        found: list[ListedScene] = self.dataset.selected(self.entry.split, None)
        return found

    @cached_property
    def _to_read(self) -> list[ListedScene]:
        """Listed once more, where scenes have to be read."""
        return self._listed()

    def queries(self, limit: int | None) -> Iterator[tuple[int, int]]:
        """(number, how many queries) of the scenes that are listed, up to a limit on queries."""
        left = sys.maxsize if limit is None else limit
        for number, queries in enumerate(self._summary[0]):
            if left <= 0:
                return
            yield number, min(left, queries)
            left -= queries

    def check(self, store: Store, group: Group, limit: int | None) -> None:
        """Compare the stored scenes of a group with what the dataset holds now.

        Raises:
            InputError: one of them is another or is no longer there, or cannot be read.
        """
        known = store.stored_scenes(group.source)
        counts, states, _ = self._summary  # taken before any scene is read: a change in between is seen the next time
        if not self.is_listed:
            if known:
                self._check_made(known, group, limit)
            return
        before, seen = 0, {}
        for number, queries in enumerate(counts):
            one = known.pop(number, None)
            if one is not None:
                state = states[number]
                if (not state or one.state != state) and not _holds(self._digest(number), one.digest):
                    raise changed_data(group, one.name)
                if (one.before, one.state) != (before, state):
                    seen[number] = one, before, state
            before += queries
        for one in known.values():
            raise changed_data(group, one.name, f"the split has {len(counts)} scenes now")
        if seen:
            with store.transaction():
                for number, (one, start, state) in seen.items():
                    store.add_scene(group.source, number, one.name, one.digest, one.queries, start, state)

    def _check_made(self, known: dict[int, StoredScene], group: Group, limit: int | None) -> None:
        most, given = sys.maxsize if limit is None else limit, 0
        for number, scene in enumerate(scenes_of(self.dataset, self.entry.split, most, group.seed)):
            one, given = known.pop(number, None), given + len(scene.queries)
            if one is not None:
                now = fingerprint.of_scene(scene)
                is_cut = given == most
                if not (fingerprint.same_scene(now, one.digest) if is_cut else _holds(now, one.digest)):
                    raise changed_data(group, one.name)
            if not known:
                return
        if given < most:
            raise changed_data(group, next(iter(known.values())).name, f"the split has {given} queries now")

    def _digest(self, number: int) -> str:
        """Of a scene's content, read anew."""
        if number not in self._digests:
            self._digests[number] = fingerprint.of_scene(self.dataset.read(self._to_read[number]))
        return self._digests[number]


def state_of(scene: ListedScene) -> str:
    """A digest that differs whenever a scene's content does: of its annotations, and the sizes and times of its files.

    It may also differ where the content does not, such as after a copy. Empty if that cannot be told without reading
    the scene.
    """
    try:
        files = [(str(path), path.stat()) for path in (scene.image, *scene.needs)]
        stats = [(path, found.st_size, found.st_mtime_ns) for path, found in files]
        drawn = [_of_drawing(query) for query in scene.queries]
        parts = pickle.dumps((_of_listing(scene), scene.size, stats, drawn), protocol=4)
    except (OSError, *PICKLING):
        return ""
    return hashlib.blake2b(parts, digest_size=8).hexdigest()


def _of_drawing(query: ListedQuery) -> Any:
    """What a target is drawn from, as plain data. Raises TypeError where it is not known."""
    draw: Callable[..., Any] = query.draw
    if not isinstance(draw, partial) or draw.func.__module__.partition(".")[0] != "tokenprune":
        raise TypeError("a function of a plugin may draw from anything, such as files that are not listed")
    owner = getattr(draw.func, "__self__", None)
    if owner is not None and not isinstance(owner, FileDataset):
        raise TypeError("a method of another object may draw from anything")
    options = None if owner is None else owner.options.model_dump(mode="json")
    return draw.func.__module__, draw.func.__qualname__, options, draw.args, draw.keywords


def _of_listing(scene: ListedScene) -> str:
    words = [scene.id, *(part for one in scene.queries for part in (one.id, one.text, one.kind, str(one.is_sentence)))]
    return hashlib.blake2b("\0".join(words).encode("utf-8", "surrogatepass"), digest_size=LISTED // 2).hexdigest()


def _holds(now: str, stored: str) -> bool:
    """Whether a whole scene, by its digest, begins with the queries of a stored one."""
    return now.count(":") >= stored.count(":") and fingerprint.same_scene(now, stored)


def changed_data(
    group: Group, name: str, found: str = "image, queries or targets changed", where: str = ""
) -> InputError:
    """The error about a stored scene that is another now."""
    return InputError(
        f"scene {name!r} of {group.dataset.label} is not the one that was run before{where}: {found}; start a new "
        "folder"
    )


@contextmanager
def warned_once() -> Iterator[None]:
    """Inside, a warning about data is shown once, however often and wherever the dataset is listed."""
    shown, seen = warnings.showwarning, set()

    def show(message: Any, category: Any, *rest: Any, **options: Any) -> None:
        if issubclass(category, DataWarning):
            if str(message) in seen:
                return
            seen.add(str(message))
        shown(message, category, *rest, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
