"""The store of a sweep: one SQLite file, one transaction for each scene, one writer at a time.

A transaction holds all records of one scene, so whatever moment a process dies at, a scene is there with all of its
queries or not at all. The file can be read while a sweep writes to it.

Goes here: the tables, opening and checking the file, and its errors.
"""

from __future__ import annotations

from tokenprune.sweeps.store.opening import FILE, reading, writing
from tokenprune.sweeps.store.problems import decoding
from tokenprune.sweeps.store.tables import DIGESTS, LISTING, Store, StoredScene, row_of

__all__ = ["DIGESTS", "FILE", "LISTING", "Store", "StoredScene", "decoding", "reading", "row_of", "writing"]
