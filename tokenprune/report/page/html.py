"""The file itself: template, style, scripts, data and plotly.js in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tokenprune.report.page.data import Study
from tokenprune.report.page.gallery import gallery_data
from tokenprune.report.page.sections import group_data, table_rows

SCRIPTS = ("plots.js", "table.js", "gallery.js")
SECTIONS = {
    "tradeoff": "Accuracy against cost",
    "layers": "Layers",
    "kinds": "Kinds",
    "times": "Time",
    "differences": "Differences",
    "table": "Table",
    "gallery": "Gallery",
    "about": "How it was made",
}
COUNTING = (
    "Equivalent tokens are the mean over decoder layers of the image tokens that enter the layer; FLOPs are of the "
    "decoder, of choosing tokens and of the mask head, without towers; KV bytes are of the prefill."
)
TIMING = (
    "Median over queries. Every method ran once on each scene, without a warm-up, with all queries of the scene in one "
    "batch; a time is that of the batch divided by its queries, with the device synchronised at each step. Image "
    "preparation and towers run once for a scene, so they are the same for all methods. Good for proportions; for "
    "speed-ups measure with tokenprune compare, which repeats and interleaves."
)


def page(study: Study) -> str:
    """The HTML of a report."""
    groups = [group_data(group) for group in study.groups]
    seeds = len({seed for group in study.groups for seed in group.records.seed.unique().tolist()})
    data = {"groups": groups, "table": table_rows(study), "gallery": gallery_data(study), "seeds": seeds}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part("page.html")).render(
        title=_title(study),
        facts=_facts(study),
        reasons=list(study.reasons.items()),
        warnings=_warnings(study),
        groups=[group.title for group in study.groups],
        sections=list(SECTIONS.items()),
        counting=COUNTING,
        timing=TIMING,
        environments=[(_day(when), _versions(what)) for when, what in study.environments],
        configuration=json.dumps(_without_paths(study.config), indent=2, ensure_ascii=False),
        style=Markup(_part("page.css")),
        data=Markup(_embedded(data)),
        plotly=Markup(get_plotlyjs()),
        scripts=[Markup(_part(name)) for name in SCRIPTS],
    )


def _part(name: str) -> str:
    return resources.files("tokenprune.report.page").joinpath("parts").joinpath(name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(_rounded(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _rounded(value: Any) -> Any:
    """Six significant digits, which no plot shows all of."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _names(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _title(study: Study) -> str:
    models, datasets = (_names([getattr(group, what) for group in study.groups]) for what in ("model", "dataset"))
    return f"Token pruning: {models} on {datasets}"


def _facts(study: Study) -> list[tuple[str, str]]:
    _, first = study.environments[0]
    hardware = str(first.get("gpu") or first.get("cpu", ""))
    dates = list(dict.fromkeys(_day(when)[:10] for when, _ in study.environments))
    return [
        ("models", _names([group.model for group in study.groups])),
        ("datasets", _names([f"{group.dataset} ({group.split}, {group.protocol})" for group in study.groups])),
        ("queries", ", ".join(dict.fromkeys(str(group.queries) for group in study.groups))),
        ("strategies", str(len({method for group in study.groups for method in group.methods}))),
        ("budgets", _names([f"{budget:g}" for group in study.groups for budget in group.budgets]) or "none"),
        ("records", str(sum(len(group.records) for group in study.groups))),
        ("first recorded", ", ".join(dates)),
        ("configuration", study.config_hash),
        ("versions", f"tokenprune {first.get('tokenprune')}, torch {first.get('torch')}"),
        ("hardware", _names([one for one in (hardware, str(first.get("dtype", ""))) if one])),
    ]


def _warnings(study: Study) -> list[str]:
    found = []
    if len({(what.get("code"), what.get("weights")) for _, what in study.environments}) > len(
        {group.model for group in study.groups}
    ):
        found.append("Some records were made with other code or weights than the rest (--accept-changes).")
    for group in study.groups:
        few = [row.label for row in group.rows if row.line.queries < group.queries]
        if few:
            found.append(f"{group.title}: not all of {group.queries} queries are stored for {', '.join(few)}.")
    return found


def _versions(what: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), str(value)) for name, value in what.items()]


def _day(when: str) -> str:
    return when.replace("T", " ").removesuffix("+00:00")


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the places of data on the machine."""
    datasets = [{key: value for key, value in entry.items() if key != "path"} for entry in config.get("datasets", ())]
    return {**config, "datasets": datasets}
