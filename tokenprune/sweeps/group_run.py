"""One group of a sweep: what is stored, what is missing, and what may be added. Only this adds records."""

from __future__ import annotations

from typing import Any

from tokenprune.errors import InputError
from tokenprune.sweeps.data_check import Data, changed_data
from tokenprune.sweeps.fingerprint import is_changed, joined_digests, same_scene
from tokenprune.sweeps.plan import Configuration, Group
from tokenprune.sweeps.store import DIGESTS, Store
from tokenprune.sweeps.worker import Origin, SceneRecords

CHANGES = {"code": "the code", "weights": "the weights"}


class GroupRun:
    """The state of one group.

    Args:
        store: open for writing.
        group: the group.
        data: its dataset, after `Data.check`.
        queries: that are expected of it; None = not known.
        shard: (i, n), see `sweep`.
        accept_changes: see `sweep`.

    Attributes:
        done: records that are stored.
        total: records that are expected; None = not known.
        seen: scenes of the dataset that were asked about, those that are stored or of other shards included.
        failed: why configurations cannot run, by their hashes.
    """

    def __init__(
        self,
        store: Store,
        group: Group,
        data: Data,
        queries: int | None,
        shard: tuple[int, int],
        accept_changes: bool,
    ) -> None:
        self.group, self._store, self._shard, self._accept = group, store, shard, accept_changes
        self._data = data
        self._stored = {one.hash: store.done(one.hash) for one in group.configurations}
        self._known = store.scenes(group.source)
        dtype = group.model.dtype
        self._digests_key = DIGESTS + group.model.label + (f" ({dtype})" if dtype else "")
        self._together = bool(store.meta().get(self._digests_key, {}).get("together"))
        self._before: list[int] = []  # queries before each scene, of those that were asked about
        self._queries = 0  # of all these
        self._origins: set[str] = set()
        self.failed: dict[str, str] = {}
        stored = sum(count for of_scene in self._stored.values() for _, count in of_scene.values())
        self.total = None if queries is None else queries * len(group.configurations)
        self.done = stored if self.total is None else min(stored, self.total)  # a limit may have been higher before

    @property
    def seen(self) -> int:
        """See the class."""
        return len(self._before)

    def pending(self, number: int, queries: int) -> tuple[Configuration, ...]:
        """The configurations that are missing on a scene, without those that cannot run. Asked in order of scenes."""
        if number == len(self._before):
            self._before.append(self._queries)
            self._queries += queries
        if number % self._shard[1] != self._shard[0] - 1:
            return ()
        missing = (one for one in self.group.configurations if not self._is_done(one, number, queries))
        return tuple(one for one in missing if one.hash not in self.failed)

    def _is_done(self, one: Configuration, number: int, queries: int) -> bool:
        """Whether the records of a configuration on a scene are those of these queries, or of these and more.

        Of more only where the others change nothing: not which are asked, and not what is answered.
        """
        had, count = self._stored[one.hash].get(number, (0, 0))
        if count < len(self.group.asked(number, had)) or had < queries:
            return False
        together = self._together and self.group.dataset.protocol != "lisa"
        return had == queries or not (together or self.group.draws)

    def add(self, found: SceneRecords) -> int:
        """Store what was found on one scene, in one transaction. Returns the number of records.

        Raises:
            InputError: code, weights or data are not those of the records that are stored.
        """
        self._check(found)
        store = self._store
        with store.transaction():
            for hashed, rows in found.rows.items():
                store.forget(hashed, found.number)
                store.add_records(rows)
            self._add_scene(found.number, found.name, found.digest, self._before[found.number])
            for hashed, options in found.options.items():
                store.set_configuration(hashed, options=options, policies=found.policies[hashed])
            for hashed, reason in found.reasons.items():
                store.set_configuration(hashed, reason=reason)
        self.failed.update(found.reasons)
        for hashed, rows in found.rows.items():
            self.done += len(rows) - self._stored[hashed].get(found.number, (0, 0))[1]
            self._stored[hashed][found.number] = found.queries, len(rows)
        return sum(map(len, found.rows.values()))

    def finish(self) -> None:
        """Expect no more: the dataset may hold fewer queries than were expected, and some configurations fail."""
        self.total = self.done

    def _add_scene(self, number: int, name: str, digest: str, before: int) -> None:
        """Store a scene; of one that is stored already, the digest that was made of more queries stays."""
        digest = max(self._known.get(number, ""), digest, key=len)
        states = self._data.states
        state = states[number] if number < len(states) else ""
        self._store.add_scene(self.group.source, number, name, digest, digest.count(":"), before, state)
        self._known[number] = digest

    def _check(self, found: SceneRecords) -> None:
        if not same_scene(self._known.get(found.number, found.digest), found.digest):
            raise changed_data(self.group, found.name, where=found.origin.where)
        if found.origin.hash not in self._origins:
            self._check_origin(found.origin)
            self._origins.add(found.origin.hash)

    def _check_origin(self, origin: Origin) -> None:
        """Store where records come from. Raises InputError if code, weights or data are others than before."""
        name, digest = origin.first
        if not same_scene(self._known.get(0, digest), digest):
            raise changed_data(self.group, name, where=origin.where)
        now, model = origin.digests, self.group.model.label
        key = self._digests_key
        before: dict[str, Any] = self._store.meta().get(key, {})
        changed = [what for name, what in CHANGES.items() if is_changed(before.get(name, now[name]), now[name])]
        if changed and not self._accept:
            raise InputError(
                f"{str(self._store.folder)!r}: {' and '.join(changed)} changed since the records of {model!r} were made"
                f"{origin.where}, so new ones would not be comparable; start a new folder, or go on with "
                "accept_changes=True (--accept-changes): every record tells what it was made with"
            )
        with self._store.transaction():
            self._add_scene(0, name, digest, 0)  # in every shard: what tells their data apart
            self._store.add_environment(origin.hash, origin.environment)
            self._store.set_meta(**{key: joined_digests(before, now)})


def queries_of(group: Group, data: Data, limit: int | None, shard: tuple[int, int]) -> int | None:
    """How many queries are asked of a group's dataset in a shard, up to the limit; None where that is not known before.

    Of a dataset that is not read from files it is an estimate: the limit, divided among the shards.
    """
    number, count = shard
    if not data.is_listed:
        return limit if limit is None or count == 1 else (limit + count - number) // count
    scenes = [*data.queries(limit)][number - 1 :: count]
    return sum(len(group.asked(place, queries)) for place, queries in scenes)
