"""The file itself: template, style, scripts, data and plotly.js in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tokenprune.report.page.answers import answer_data
from tokenprune.report.page.data import AnswerGroup, Group, Study
from tokenprune.report.page.gallery import gallery_data
from tokenprune.report.page.sections import group_data, table_rows

SCRIPTS = ("plots.js",)
MASK_SCRIPTS = ("masks.js", "table.js", "gallery.js")
ANSWER_SCRIPTS = ("answers.js",)
SECTIONS = {
    "tradeoff": "Accuracy against cost",
    "layers": "Layers",
    "kinds": "Kinds",
    "times": "Time",
    "differences": "Differences",
    "table": "Table",
    "answers": "Answers",
    "gallery": "Gallery",
    "about": "How it was made",
}
WITHOUT_MASKS = ("answers", "about")  # sections of a store that has answers alone
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

SCORING = (
    "Scores are those of the evaluator, or the mean over answers of a metric that it gave for each answer alone. "
    "Intervals are 95 %: 1.96 standard errors, the evaluator's or that of the mean, on each side; – stands where none "
    "is known. Tokens are means over answers. FLOPs are those of the prefill, as a share of the same prompts' without "
    "pruning."
)


def page(study: Study) -> str:
    """The HTML of a report."""
    groups = [group_data(group) for group in study.groups]
    seeds = len({seed for group in study.groups for seed in group.records.seed.unique().tolist()})
    data = {"groups": groups, "table": table_rows(study), "gallery": gallery_data(study), "seeds": seeds}
    data["answers"] = [answer_data(group) for group in study.answers]
    scripts = [*SCRIPTS, *(MASK_SCRIPTS if groups else ()), *(ANSWER_SCRIPTS if study.answers else ())]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part("page.html")).render(
        title=_title(study),
        facts=_facts(study),
        reasons=list(study.reasons.items()),
        warnings=_warnings(study),
        groups=[group.title for group in study.groups],
        answers=[group.title for group in study.answers],
        sections=_sections(study),
        counting=COUNTING,
        timing=TIMING,
        scoring=SCORING,
        environments=[(_day(when), _versions(what)) for when, what in study.environments],
        configuration=study.config and json.dumps(_without_paths(study.config), indent=2, ensure_ascii=False),
        style=Markup(_part("page.css")),
        data=Markup(_embedded(data)),
        plotly=Markup(get_plotlyjs()),
        scripts=[Markup(_part(name)) for name in scripts],
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


def _sections(study: Study) -> list[tuple[str, str]]:
    """The sections that a page has: anchors and names."""
    return [
        (anchor, name)
        for anchor, name in SECTIONS.items()
        if (study.groups or anchor in WITHOUT_MASKS) and (study.answers or anchor != "answers")
    ]


def _title(study: Study) -> str:
    every: list[Group | AnswerGroup] = [*study.groups, *study.answers]
    models, datasets = (_names([getattr(group, what) for group in every]) for what in ("model", "dataset"))
    return f"Token pruning: {models} on {datasets}"


def _facts(study: Study) -> list[tuple[str, str]]:
    every: list[Group | AnswerGroup] = [*study.groups, *study.answers]
    dates = list(dict.fromkeys(_day(when)[:10] for when, _ in study.environments))
    methods = {method for group in every for method in group.methods}
    budgets = [budget for group in study.groups for budget in group.budgets]
    budgets += sorted({line.budget for group in study.answers for line in group.lines if line.budget}, reverse=True)
    return [
        ("models", _names([group.model for group in every])),
        ("datasets", _names([group.title.removeprefix(f"{group.model} on ") for group in every])),
        *(
            [("queries", ", ".join(dict.fromkeys(str(group.queries) for group in study.groups)))]
            if study.groups
            else []
        ),
        ("strategies", str(len(methods))),
        ("budgets", _names([f"{budget:g}" for budget in budgets]) or "none"),
        *([("records", str(sum(len(group.records) for group in study.groups)))] if study.groups else []),
        *(
            [("answers", str(sum(line.answers for group in study.answers for line in group.lines)))]
            if study.answers
            else []
        ),
        ("first recorded", ", ".join(dates)),
        *(_facts_of_sweep(study) if study.groups else []),
    ]


def _facts_of_sweep(study: Study) -> list[tuple[str, str]]:
    first = next((what for what in study.recorded if "code" in what), {})
    hardware = str(first.get("gpu") or first.get("cpu", ""))
    return [
        ("configuration", study.config_hash),
        ("versions", f"tokenprune {first.get('tokenprune')}, torch {first.get('torch')}"),
        ("hardware", _names([one for one in (hardware, str(first.get("dtype", ""))) if one])),
    ]


def _warnings(study: Study) -> list[str]:
    found = []
    made = {json.dumps([what["code"], what.get("weights")]) for what in study.recorded if "code" in what}
    if len(made) > len({group.model for group in study.groups}):
        found.append("Some records were made with other code or weights than the rest (--accept-changes).")
    for group in study.groups:
        few = [row.label for row in group.rows if row.line.queries < group.queries]
        if few:
            found.append(f"{group.title}: not all of {group.queries} queries are stored for {', '.join(few)}.")
    for answered in study.answers:
        few = [line.label for line in answered.lines if line.answers < answered.answers]
        if few:
            found.append(f"{answered.title}: not all of {answered.answers} answers are stored for {', '.join(few)}.")
    return found


def _versions(what: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), str(value)) for name, value in what.items()]


def _day(when: str) -> str:
    return when.replace("T", " ").removesuffix("+00:00")


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the places of data on the machine."""
    datasets = [{key: value for key, value in entry.items() if key != "path"} for entry in config.get("datasets", ())]
    return {**config, "datasets": datasets}
