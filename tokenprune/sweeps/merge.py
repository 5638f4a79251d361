"""Merging the shards of a sweep into one store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.errors import InputError, OptionError
from tokenprune.sweeps.fingerprint import same_scene
from tokenprune.sweeps.run import Swept
from tokenprune.sweeps.store import FILE, Store, reading, writing
from tokenprune.utils.arguments import listed
from tokenprune.utils.files import path_given

TABLES = ("environments", "configurations", "scenes", "records")


def merge(shards: Sequence[str | Path], out: str | Path) -> Swept:
    """Copy the records of several stores into one, where every sample of a configuration is counted once.

    Args:
        shards: folders of stores.
        out: folder of the result, which may hold some of them already.

    Raises:
        OptionError: no shard.
        InputError: a store cannot be read or written; two shards were made with other code, weights or data.
    """
    folders = listed(shards)
    if not folders:
        raise OptionError("no shards found, expected the folders of at least one")
    with writing(out) as store:
        before = store.count()
        for shard in folders:
            if path_given("shard", shard).resolve() == store.folder.resolve():
                raise InputError(f"{str(shard)!r} is the folder to merge into; give it another one with --out")
            with reading(shard) as other:
                _check(store, other, shard)
                with store.transaction():
                    _copy(store, other)
        after = store.count()
    return Swept(store.folder, after, after - before)


def _copy(store: Store, other: Store) -> None:
    for table in TABLES:
        for row in other.rows(f"SELECT * FROM {table}"):
            store.rows(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    mine, theirs = store.meta(), other.meta()
    planned = [*mine.get("planned", ()), *theirs.get("planned", ())]
    kept = {key: value for key, value in theirs.items() if key not in ("shard", "planned")}
    store.set_meta(**{**kept, **mine, "shard": [1, 1], "planned": list(dict.fromkeys(planned))})


def _check(store: Store, other: Store, shard: str | Path) -> None:
    mine, theirs = store.meta(), other.meta()
    for key, value in theirs.items():
        if key.startswith("digests of ") and mine.get(key, value) != value:
            model = key.removeprefix("digests of ")
            raise InputError(
                f"{str(shard)!r}: its records of {model!r} were made with other code or weights than those of "
                f"{str(store.folder / FILE)!r}; run the shards with the same ones"
            )
    known = {
        (source, scene): digest for source, scene, digest in store.rows("SELECT source, scene, digest FROM scenes")
    }
    for source, scene, name, digest in other.rows("SELECT source, scene, name, digest FROM scenes"):
        if not same_scene(known.get((source, scene), digest), digest):
            raise InputError(f"{str(shard)!r}: scene {name!r} has another image, query or target than in the others")
