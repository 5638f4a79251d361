"""Merging the shards of a sweep into one store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.data_check import LISTED
from tokenprune.sweeps.fingerprint import is_changed, joined_digests, same_scene
from tokenprune.sweeps.results import reasons_of
from tokenprune.sweeps.run import Swept, refuse_tuning
from tokenprune.sweeps.store import DIGESTS, FILE, LISTING, Store, reading, writing
from tokenprune.sweeps.store.answer_tables import first_difference
from tokenprune.utils.arguments import listed
from tokenprune.utils.files import path_given

SHOWN = "model, dataset, split, protocol, label, seed"  # what tells configurations apart in the results


def merge(shards: Sequence[str | Path], out: str | Path) -> Swept:
    """Copy the records and answers of several stores into one, where every sample of a configuration is counted once.

    Args:
        shards: folders of stores.
        out: folder of the result, which may hold some of them already.

    Raises:
        OptionError: no shard.
        InputError: a store cannot be read or written; two shards were made with other code, weights or data, or with
            configurations that have the same name in the results, or have different answers to the same sample.
    """
    folders = listed(shards)
    if not folders:
        raise OptionError("no shards found, expected the folders of at least one")
    for shard in folders:
        if path_given("shard", shard).resolve() == path_given("folder of a sweep", out).resolve():
            raise InputError(f"{str(shard)!r} is the folder to merge into; give it another one with --out")
        with reading(shard) as other:  # before the folder of the result is made
            refuse_tuning(other, shard)
    with writing(out) as store:
        refuse_tuning(store, out)
        before, asked, again = store.count(), store.count("answers"), set[str]()
        for shard in folders:
            with reading(shard) as other:
                _check(store, other, shard)
                with store.transaction():
                    _copy(store, other, again)
        after, planned = store.count(), store.meta().get("planned", [])
        ran = sum(bool(store.done(hashed)) for hashed in planned)
        answers = store.count("answers")
        return Swept(
            store.folder, after, after - before, ran, reasons_of(store, planned), answers, added_answers=answers - asked
        )


def _copy(store: Store, other: Store, again: set[str]) -> None:
    """Add what another store has.

    Args:
        store: to add to.
        other: the other one.
        again: configurations of the stores before, whose reasons are to stay; added to.
    """
    _insert(store, other, "environments")
    for row in other.rows("SELECT hash, options, policies, reason FROM configurations"):
        hashed, *found = row
        if hashed not in again:  # it may have run in a shard since an earlier merge
            store.change("UPDATE configurations SET reason = NULL WHERE hash = ?", (hashed,))
            again.add(hashed)
        filled = ", ".join(f"{name} = COALESCE({name}, ?)" for name in ("options", "policies", "reason"))
        store.change(f"UPDATE configurations SET {filled} WHERE hash = ?", (*found, hashed))
    _insert(store, other, "configurations")
    # of a scene that a limit had cut, the records of more queries count, and none of the others
    lengths = "SELECT configuration, scene, MAX(LENGTH(scene_digest)) FROM records GROUP BY configuration, scene"
    mine = {(hashed, scene): length for hashed, scene, length in store.rows(lengths)}
    shorter = set()
    for hashed, scene, length in other.rows(lengths):
        if length > mine.get((hashed, scene), length):
            store.forget(hashed, scene)
        elif length < mine.get((hashed, scene), length):
            shorter.add((hashed, scene))
    _insert(store, other, "records", shorter)
    for source, scene, digest in other.rows("SELECT source, scene, digest FROM scenes"):
        where = "source = ? AND scene = ? AND LENGTH(digest) < ?"
        store.change(f"DELETE FROM scenes WHERE {where}", (source, scene, len(digest)))
    _insert(store, other, "scenes")
    _insert(store, other, "answers")
    _insert(store, other, "scores")
    store.set_meta(**_merged(store.meta(), other.meta()))


def _insert(store: Store, other: Store, table: str, without: set[tuple[str, int]] = frozenset()) -> None:  # type: ignore[assignment]
    for row in other.rows(f"SELECT * FROM {table}"):
        if row[:2] not in without:
            store.change(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def _merged(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What is planned in either, up to the higher limit; else what the first one says."""
    found: dict[str, Any] = {**theirs, **mine, "shard": [1, 1]}
    found["planned"] = list(dict.fromkeys([*mine.get("planned", ()), *theirs.get("planned", ())]))
    limits = [meta["config"].get("limit") for meta in (mine, theirs) if "config" in meta]
    if limits:
        found["config"] = {**found["config"], "limit": None if None in limits else max(limits)}
    for key in mine.keys() & theirs.keys():
        if key.startswith(LISTING):
            found[key] = max(mine[key], theirs[key], key=len)
        elif key.startswith(DIGESTS):
            found[key] = joined_digests(mine[key], theirs[key])
    return found


def _check(store: Store, other: Store, shard: str | Path) -> None:
    mine, theirs = store.meta(), other.meta()
    for key, value in theirs.items():
        if key.startswith(DIGESTS) and any(is_changed(mine.get(key, value)[name], value[name]) for name in value):
            model = key.removeprefix(DIGESTS)
            raise InputError(
                f"{str(shard)!r}: its records of {model!r} were made with other code or weights than those of "
                f"{str(store.folder / FILE)!r}; run the shards with the same ones"
            )
        if key.startswith(LISTING) and key in mine:
            common = min(len(value), len(mine[key]))
            if value[:common] != mine[key][:common]:
                place = next(at for at in range(0, common, LISTED) if value[at:][:LISTED] != mine[key][at:][:LISTED])
                raise InputError(
                    f"{str(shard)!r}: scene {place // LISTED} of its data has another name or other queries than in "
                    f"{str(store.folder / FILE)!r}; run all shards on the same data"
                )
    known = {
        (source, scene): digest for source, scene, digest in store.rows("SELECT source, scene, digest FROM scenes")
    }
    for source, scene, name, digest in other.rows("SELECT source, scene, name, digest FROM scenes"):
        if not same_scene(known.get((source, scene), digest), digest):
            raise InputError(
                f"{str(shard)!r}: scene {name!r} has another image, query or target than in the others; run all shards "
                "on the same data"
            )
    _check_shown(store, other, shard)
    if found := first_difference(store, other):
        hashed, what = found
        ((label, model, dataset),) = other.rows(
            "SELECT label, model, dataset FROM configurations WHERE hash = ?", (hashed,)
        )
        raise InputError(
            f"{str(shard)!r}: {label} with {model} on {dataset}: {what} is another than in the others; merge answers "
            "that were made with the same settings"
        )


def _check_shown(store: Store, other: Store, shard: str | Path) -> None:
    """Configurations that are shown under the same name must be the same."""
    named: dict[tuple[Any, ...], str] = {}
    for one in (store, other):
        planned = set(one.meta().get("planned", ()))
        for hashed, *name in one.rows(f"SELECT hash, {SHOWN} FROM configurations"):
            if hashed in planned and named.setdefault(tuple(name), hashed) != hashed:
                model, dataset, split, _, label, _ = name
                raise InputError(
                    f"{str(shard)!r}: {label} with {model} on {dataset} ({split}) has other options or another number "
                    "format there; give them names and titles of their own in the configuration"
                )
