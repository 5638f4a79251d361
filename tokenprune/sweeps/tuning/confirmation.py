"""The confirmation of a search: gIoU and cIoU with intervals, and differences from the default on the same queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.evaluation.statistics import (
    Difference,
    Estimate,
    mean_interval,
    paired_difference,
    ratio_interval,
)
from tokenprune.sweeps.fingerprint import image_of
from tokenprune.sweeps.plan import Configuration
from tokenprune.sweeps.store import Store, decoding

DEFAULT = "default"
COLUMNS = 'scene, query, iou, intersection, "union", equivalent_tokens, image_tokens, scene_digest'


@dataclass(frozen=True)
class Row:
    """One contender of a confirmation.

    Attributes:
        name: "untouched", "default", "tuned 1", …
        label: the strategy with its options and budget.
        given: options that were fixed or found.
        options: that it ran with on the first query.
        calibration: gIoU on the calibration queries; None if it did not run there.
        queries: how many confirm.
        giou, ciou: with intervals; None if it could not run.
        equivalent_tokens, tokens_ratio: mean, and its share of the image tokens.
        difference: of the IoUs from the default's; None for itself and the untouched model.
        reason: why it could not run.
    """

    name: str
    label: str
    given: dict[str, Any]
    options: dict[str, Any]
    calibration: float | None = None
    queries: int = 0
    giou: Estimate | None = None
    ciou: Estimate | None = None
    equivalent_tokens: float | None = None
    tokens_ratio: float | None = None
    difference: Difference | None = None
    reason: str | None = None


def rows_of(
    store: Store,
    ones: Mapping[str, Configuration],
    calibrated: Mapping[str, float | None],
    asked: Sequence[tuple[int, int]],
    failed: Mapping[str, str],
) -> list[Row]:
    """A row for each configuration.

    Args:
        store: with their records.
        ones: configurations by name.
        calibrated: gIoU of the calibration by name.
        asked: (scene, query) of the queries that count.
        failed: reasons by hash.
    """
    base = None if ones[DEFAULT].hash in failed else _records(store, ones[DEFAULT], asked)
    rows = []
    for name, one in ones.items():
        contender, found = one.contender, calibrated.get(name)
        head = (name, contender.label, contender.given, _options(store, one), found)
        if one.hash in failed:
            rows.append(Row(*head, reason=failed[one.hash]))
            continue
        records = _records(store, one, asked)
        ious, above, below, tokens, images, scenes = records
        compared = base is not None and name.startswith("tuned")
        rows.append(
            Row(
                *head,
                len(ious),
                mean_interval(ious, scenes),
                ratio_interval(above, below, scenes),
                sum(tokens) / len(tokens),
                sum(tokens) / max(sum(images), 1),
                paired_difference(ious, base[0], scenes) if compared and base is not None else None,
            )
        )
    return rows


def _records(store: Store, one: Configuration, asked: Sequence[tuple[int, int]]) -> tuple[list[Any], ...]:
    """Columns of the queries, in their order; scenes by the digests of their images."""
    rows = store.rows(f"SELECT {COLUMNS} FROM records WHERE configuration = ?", (one.hash,))
    known = {(scene, query): (*rest, image_of(digest)) for scene, query, *rest, digest in rows}
    return tuple(map(list, zip(*(known[place] for place in asked), strict=True)))


def _options(store: Store, one: Configuration) -> dict[str, Any]:
    ((text,),) = store.rows("SELECT options FROM configurations WHERE hash = ?", (one.hash,))
    with decoding(store.folder):
        found: dict[str, Any] = json.loads(text) if text else {}
    return found
