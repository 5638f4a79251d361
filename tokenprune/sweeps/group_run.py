"""One group of a sweep: what is stored, what is missing, and what may be added. Only this adds records."""

from __future__ import annotations

from typing import Any

from tokenprune.datasets.files.dataset import FileDataset
from tokenprune.errors import InputError
from tokenprune.sweeps.fingerprint import same_scene
from tokenprune.sweeps.plan import Configuration, Group
from tokenprune.sweeps.store import Store
from tokenprune.sweeps.worker import Origin, SceneRecords

CHANGES = {"code": "the code", "weights": "the weights"}


class GroupRun:
    """The state of one group.

    Args:
        store: open for writing.
        group: the group.
        queries: that are expected of its dataset; None = not known.
        shard: (i, n), see `sweep`.
        accept_changes: see `sweep`.

    Attributes:
        done: records that are stored.
        total: records that are expected; None = not known.
        failed: why configurations cannot run, by their hashes.
    """

    def __init__(
        self, store: Store, group: Group, queries: int | None, shard: tuple[int, int], accept_changes: bool
    ) -> None:
        self.group, self._store, self._shard, self._accept = group, store, shard, accept_changes
        self._stored = {one.hash: store.done(one.hash) for one in group.configurations}
        self._known = store.scenes(group.source)
        self._origins: set[str] = set()
        self.failed: dict[str, str] = {}
        stored = sum(sum(of_scene.values()) for of_scene in self._stored.values())
        self.total = None if queries is None else queries * len(group.configurations)
        self.done = stored if self.total is None else min(stored, self.total)  # a limit may have been higher before

    def pending(self, number: int, queries: int) -> tuple[Configuration, ...]:
        """The configurations that are missing on a scene, without those that cannot run."""
        if number % self._shard[1] != self._shard[0] - 1:
            return ()
        asked = len(self.group.asked(number, queries))
        missing = (one for one in self.group.configurations if self._stored[one.hash].get(number, 0) < asked)
        return tuple(one for one in missing if one.hash not in self.failed)

    def add(self, found: SceneRecords) -> int:
        """Store what was found on one scene, in one transaction. Returns the number of records.

        Raises:
            InputError: code, weights or data are not those of the records that are stored.
        """
        self._check(found)
        store = self._store
        with store.transaction():
            for rows in found.rows.values():
                store.add_records(rows)
            store.add_scene(self.group.source, found.number, found.name, found.digest, found.queries)
            for hashed, options in found.options.items():
                store.set_configuration(hashed, options=options, policies=found.policies[hashed])
            for hashed, reason in found.reasons.items():
                store.set_configuration(hashed, reason=reason)
        self.failed.update(found.reasons)
        for hashed, rows in found.rows.items():
            self.done += len(rows) - self._stored[hashed].get(found.number, 0)
            self._stored[hashed][found.number] = len(rows)
        return sum(map(len, found.rows.values()))

    def finish(self) -> None:
        """Expect no more: the dataset may hold fewer queries than were expected, and some configurations fail."""
        self.total = self.done

    def _check(self, found: SceneRecords) -> None:
        if not same_scene(self._known.get(found.number, found.digest), found.digest):
            raise _changed_data(self.group, found.name, found.origin)
        if found.origin.hash not in self._origins:
            self._check_origin(found.origin)
            self._origins.add(found.origin.hash)

    def _check_origin(self, origin: Origin) -> None:
        """Store where records come from. Raises InputError if code, weights or data are others than before."""
        name, digest = origin.first
        if not same_scene(self._known.setdefault(0, digest), digest):
            raise _changed_data(self.group, name, origin)
        now, model = origin.environment, self.group.model.label
        before: dict[str, Any] = self._store.meta().get(f"digests of {model}", {})
        changed = [what for name, what in CHANGES.items() if before.get(name, now[name]) != now[name]]
        if changed and not self._accept:
            raise InputError(
                f"{str(self._store.folder)!r}: {' and '.join(changed)} changed since the records of {model!r} were made"
                f"{origin.where}, so new ones would not be comparable; start a new folder, or go on with "
                "accept_changes=True (--accept-changes): every record tells what it was made with"
            )
        with self._store.transaction():
            self._store.add_environment(origin.hash, now)
            self._store.set_meta(**{f"digests of {model}": {name: now[name] for name in CHANGES}})


def queries_of(group: Group, limit: int | None, shard: tuple[int, int]) -> int | None:
    """How many queries are asked of a group's dataset in a shard, up to the limit; None where that is not known before.

    Of a dataset that is not read from files it is an estimate: the limit, divided among the shards.
    """
    (number, count), data = shard, group.dataset.make()
    if not isinstance(data, FileDataset):
        return limit if limit is None or count == 1 else (limit + count - number) // count
    scenes = [*enumerate(data.selected(group.dataset.split, limit))][number - 1 :: count]
    return sum(len(group.asked(place, len(scene.queries))) for place, scene in scenes)


def _changed_data(group: Group, name: str, origin: Origin) -> InputError:
    return InputError(
        f"scene {name!r} of {group.dataset.label} is not the one that was run before{origin.where}: image, queries or "
        "targets changed; start a new folder"
    )
