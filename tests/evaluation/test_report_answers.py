"""Answers in a report: their numbers are those of the store, beside masks and without them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stored_answers import answer_of, set_of, sets_of

import tokenprune as tp
from tokenprune.cli.app import main
from tokenprune.report import write_report
from tokenprune.report.figures import figures_of_answers
from tokenprune.report.overlays import file_name
from tokenprune.report.page.answers import tradeoff
from tokenprune.report.page.data import read_study
from tokenprune.sweeps.answer_summary import AnswerLine, summarised_answers
from tokenprune.sweeps.answers import store_answers

SWEEP = {
    "models": "lisa-tiny",
    "datasets": "shapes",
    "strategies": ["none", "random", "fastv"],
    "budgets": [0.5],
    "limit": 2,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with answers alone, and its report."""
    folder = tmp_path_factory.mktemp("alone")
    store_answers(folder / "run", sets_of())
    write_report(folder / "run", folder / "report.html", folder / "tables", folder / "figures")
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two datasets of answers beside it, and its report."""
    folder = tmp_path_factory.mktemp("both")
    tp.sweep(SWEEP, folder / "run")
    store_answers(folder / "run", [*sets_of(), *sets_of(dataset="boxes")])
    write_report(folder / "run", folder / "report.html", folder / "tables", folder / "figures")
    return folder


def data_of(folder: Path) -> Any:
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


def test_the_numbers_are_those_of_the_store(alone: Path) -> None:
    (group,) = data_of(alone)["answers"]
    lines = {(line.method, line.budget): line for line in summarised_answers(alone / "run")}
    assert group["title"] == "some-model on questions (val, an-evaluator)"
    assert group["metrics"] == ["accuracy", "total", "exact_match"]
    assert [(row["strategy"], row["budget"]) for row in group["rows"]] == [
        *[("none", None), ("fastv", 0.5), ("fastv", 0.25), ("visionzip", 0.5), ("visionzip", 0.25)],
    ]
    for row in group["rows"]:
        line = lines[row["strategy"], row["budget"]]
        assert [row["images"], row["tokens"], row["share"], row["flops"]] == pytest.approx(
            [line.image_tokens, line.equivalent_tokens, line.tokens_ratio, line.flops_ratio], rel=1e-5
        )
        assert row["answers"] == line.answers == 6
        for metric, score in line.scores.items():
            found = row["scores"][metric]
            assert found["value"] == pytest.approx(score.estimate.value, rel=1e-5)
            assert found["stderr"] == (None if score.stderr is None else pytest.approx(score.stderr, rel=1e-5))
            interval = score.estimate.interval
            assert found["interval"] == (None if interval is None else pytest.approx(list(interval), rel=1e-5))
        assert row["scores"]["total"]["interval"] is None


def test_plots_show_the_numbers_of_the_table(alone: Path) -> None:
    (group,) = data_of(alone)["answers"]
    for metric in group["metrics"]:
        for cost, key in (("tokens", "share"), ("flops", "flops")):
            plot = group["tradeoff"][metric][cost]
            drawn = {one["legendgroup"]: one for one in plot["data"] if one["meta"]["role"] == "curve"}
            assert [*drawn] == ["none", "fastv", "visionzip"]
            for method, curve in drawn.items():
                rows = [row for row in group["rows"] if row["strategy"] == method][::-1]
                assert curve["x"] == [row[key] for row in rows]
                assert curve["y"] == [row["scores"][metric]["value"] for row in rows]
            bands = {one["legendgroup"] for one in plot["data"] if one["meta"]["role"] == "band"}
            assert bands == (set() if metric == "total" else {"fastv", "visionzip"})


def test_a_front_of_errors_is_that_of_the_lowest(tmp_path: Path) -> None:
    scores = {
        budget: {"error": {"value": value, "higher_is_better": False}} for budget, value in ((0.5, 0.2), (0.25, 0.4))
    }
    store_answers(tmp_path, [set_of("fastv", budget, scores=score) for budget, score in scores.items()])
    (group,) = read_study(tmp_path).answers
    plot = tradeoff(group, "error", "tokens")
    assert plot is not None
    (edge,) = (one for one in plot["data"] if one["meta"]["role"] == "front")
    assert (edge["x"], edge["y"]) == ([0.25, 0.5], [0.4, 0.2])


def test_a_method_has_one_colour(both: Path) -> None:
    """Among masks and answers alike, though these have no `random`."""
    data = data_of(both)
    slots = [
        {one["name"]: one["slot"] for one in plot["legend"]}
        for plot in (
            data["groups"][0]["tradeoff"]["giou"]["tokens"],
            data["answers"][0]["tradeoff"]["accuracy"]["tokens"],
        )
    ]
    assert slots[0] == {"none": 0, "random": 1, "fastv": 2, "Pareto front": -2}
    assert slots[1] == {"none": 0, "fastv": 2, "visionzip": 3, "Pareto front": -2}


def test_of_many_methods_the_answers_have_colours_of_their_own(tmp_path: Path) -> None:
    store_answers(tmp_path, [set_of(f"method-{number}") for number in range(9)])
    store_answers(tmp_path, [set_of(f"method-{number}", dataset="quizzes") for number in (7, 8)])
    found = {group.dataset: group.order for group in read_study(tmp_path).answers}
    assert found == {"questions": [f"method-{number}" for number in range(9)], "quizzes": ["method-7", "method-8"]}


def test_without_masks_there_are_no_empty_sections(alone: Path, both: Path) -> None:
    sections = {
        folder: re.findall(r'<section id="(\w+)">', (folder / "report.html").read_text()) for folder in (alone, both)
    }
    assert sections[alone] == ["answers", "about"]
    assert {"tradeoff", "table", "answers", "gallery", "about"} <= {*sections[both]}
    assert data_of(alone)["groups"] == data_of(alone)["gallery"] == []
    text = (both / "report.html").read_text(encoding="utf-8")
    assert "Token pruning: lisa-tiny, some-model on shapes, boxes, questions" in text
    assert "accept-changes" not in text  # the answers' environment has no code that could be other


def test_a_report_without_answers_has_no_section_of_them(tmp_path: Path) -> None:
    tp.sweep({**SWEEP, "strategies": "none"}, tmp_path / "run")
    paths = write_report(tmp_path / "run", tmp_path / "report.html", tmp_path / "tables")
    assert [path.name for path in paths] == ["report.html", "results.csv", "results.md", "results.tex"]
    assert "Answers" not in re.sub(r"<script.*?</script>", "", paths[0].read_text(encoding="utf-8"), flags=re.DOTALL)


def test_fewer_answers_are_told(tmp_path: Path) -> None:
    store_answers(tmp_path / "run", [set_of(), set_of("fastv", 0.5, count=4)])
    write_report(tmp_path / "run", tmp_path / "report.html")
    assert "not all of 6 answers are stored for fastv at 0.5" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_answers_to_other_questions_are_told(tmp_path: Path) -> None:
    """As many of each, but not to the same."""
    others = [answer_of(number, 0.5) for number in range(6, 12)]
    store_answers(tmp_path / "run", [set_of(), set_of("fastv", 0.5, answers=others)])
    write_report(tmp_path / "run", tmp_path / "report.html")
    told = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not all of 12 answers are stored for none, fastv at 0.5" in told


def test_tables_hold_the_numbers(alone: Path) -> None:
    rows = list(csv.DictReader((alone / "tables" / "answers.csv").open(encoding="utf-8")))
    lines = {line.label: line for line in summarised_answers(alone / "run")}
    assert len(rows) == 5 * 3
    for row in rows:
        line, score = lines[row["label"]], lines[row["label"]].scores[row["metric"]]
        assert float(row["score"]) == score.estimate.value
        assert row["stderr"] == ("" if score.stderr is None else str(score.stderr))
        assert (row["low"] == "") is (score.estimate.interval is None)
        assert float(row["FLOPs share"]) == line.flops_ratio
    markdown = (alone / "tables" / "answers.md").read_text(encoding="utf-8")
    assert "| fastv | 0.5 | 0.375 [0.277, 0.473] | 1512.250 [–] |" in markdown
    assert "| 64.0 | 32.0 | 50 % | 6 |" in markdown
    latex = (alone / "tables" / "answers.tex").read_text(encoding="utf-8")
    assert r"fastv & 0.5 & $0.375_{\pm0.098}$ & $1512.250$ &" in latex
    assert latex.count("{") == latex.count("}")
    assert len({line.count("&") for line in latex.splitlines() if line.endswith(r"\\")}) == 1
    assert not list((alone / "tables").glob("results.*"))


def test_figures(alone: Path, both: Path) -> None:
    names = {path.name for path in (alone / "figures").iterdir()}
    assert names == {
        f"answers-{metric}-single.{kind}"
        for metric in ("accuracy", "total", "exact-match")
        for kind in ("png", "svg", "pdf")
    }
    with Image.open(alone / "figures" / "answers-accuracy-single.png") as image:
        assert image.width == pytest.approx(3.3 * 300, abs=1)
    names = {path.stem for path in (both / "figures").iterdir()}
    assert {"tradeoff-double", "some-model-boxes-val-answers-accuracy-single"} <= names


def test_the_command(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            ["report", str(alone / "run"), "--out", str(tmp_path / "report.html"), "--tables", str(tmp_path / "tables")]
        )
    assert not done.value.code
    assert "wrote 3 files in" in capsys.readouterr().err


def test_a_line_without_a_score(tmp_path: Path) -> None:
    """Which other strategies have: it is – everywhere, and no point."""
    store_answers(tmp_path / "run", [set_of(), set_of("fastv", 0.5, scores={}, answers=[answer_of(0, flops=None)])])
    write_report(tmp_path / "run", tmp_path / "report.html", tmp_path, tmp_path)
    line: AnswerLine = summarised_answers(tmp_path / "run")[1]
    assert [*line.scores] == ["exact_match"]
    (group,) = data_of(tmp_path)["answers"]
    assert [one["name"] for one in group["tradeoff"]["accuracy"]["tokens"]["legend"]] == ["none", "Pareto front"]
    assert "| fastv | 0.5 | – | – |" in (tmp_path / "answers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("others", [[], [set_of()]], ids=["alone", "beside scores"])
def test_a_strategy_without_scores_is_in_every_table(tmp_path: Path, others: list[dict[str, Any]]) -> None:
    lone = set_of("fastv", 0.5, scores={}, answers=[answer_of(0, 0.5, metrics={})])
    store_answers(tmp_path / "run", [lone, *others])
    write_report(tmp_path / "run", tmp_path / "report.html", tmp_path, tmp_path / "figures")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    (row,) = (row for row in rows if row["strategy"] == "fastv")
    assert {row[name] for name in ("metric", "score", "stderr", "low", "high")} == {""}
    assert (row["label"], row["answers"], row["image tokens"]) == ("fastv at 0.5", "1", "64.0")
    assert len(rows) == 1 + 3 * len(others)
    assert "| fastv | 0.5 |" in (tmp_path / "answers.md").read_text(encoding="utf-8")
    assert "fastv & 0.5 &" in (tmp_path / "answers.tex").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [r"$\frac{$", "a$b_c$", "_hidden", r"\$", "$" * 3])
def test_figures_print_names_as_they_are(tmp_path: Path, name: str) -> None:
    """Dollars are no mathematics, and matplotlib leaves no name out of the legend."""
    scores = {name: {"value": 0.5, "stderr": 0.1}}
    sets = [set_of(name, budget, given={"mode": name}, scores=scores) for budget in (0.5, 0.25)]
    store_answers(tmp_path / "run", [*sets, set_of("_lone", scores=scores)])
    write_report(tmp_path / "run", tmp_path / "report.html", figures=tmp_path / "figures")
    (group,) = read_study(tmp_path / "run").answers
    figure = figures_of_answers(group)[f"answers-{file_name(name)}-single"]
    (legend,) = figure.legends
    texts = [*legend.get_texts(), figure.axes[0].yaxis.label]
    assert {text.get_text() for text in texts} == {f"{name} (mode={name})", "_lone", name}
    assert not any(text.get_parse_math() for text in texts)


def test_a_figure_of_grey_methods_alone_has_no_legend(tmp_path: Path) -> None:
    store_answers(tmp_path / "run", [set_of(f"method-{number}") for number in range(8)])
    store_answers(tmp_path / "run", [set_of("method-8", scores={"other": {"value": 0.5}})])
    (group,) = read_study(tmp_path / "run").answers
    figures = figures_of_answers(group)
    assert [len(figures[f"answers-{name}-single"].legends) for name in ("accuracy", "other")] == [1, 0]


def test_names_are_on_one_line(tmp_path: Path) -> None:
    odd = "d\n\\input{/etc/passwd}\r|\u2028<b>\x1b[0m"
    named = {"dataset": odd, "scores": {odd: {"value": 0.5}}}
    store_answers(tmp_path / "run", [set_of(odd, **named), set_of("[1ex]", **named), set_of("*", **named)])
    write_report(tmp_path / "run", tmp_path / "report.html", tmp_path, tmp_path / "figures")
    latex = (tmp_path / "answers.tex").read_text(encoding="utf-8")
    assert [line for line in latex.splitlines() if r"\input" in line] == [
        r"% some-model on d \input{/etc/passwd} | <b> [0m (val, an-evaluator), 6 answers"
    ]
    assert r"d \textbackslash{}input\{/etc/passwd\} \textbar{} \textless{}b\textgreater{} {[}0m &" in latex
    assert "\n{[}1ex] &" in latex  # "[" and "*" after the end of a row would be its arguments
    assert "\n{*} &" in latex
    markdown = (tmp_path / "answers.md").read_text(encoding="utf-8").splitlines()
    name = r"d \\input{/etc/passwd} \| &lt;b> \[0m"
    assert markdown[0] == f"## some-model on {name} (val, an-evaluator), 6 answers"
    assert any(line.startswith(f"| {name} | – |") for line in markdown)
    assert markdown[2].startswith(f"| strategy | budget | {name} |")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown[2:] if line} == {9}
    assert all(line.isprintable() for line in markdown)
    for picture in (tmp_path / "figures").glob("*.svg"):
        assert "\x1b" not in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize("masks", [False, True])
def test_environments_of_answers_may_hold_anything(tmp_path: Path, masks: bool) -> None:
    """Also under the names that records use: these tell of no changed code, and of no sweep's hardware."""
    store_answers(tmp_path / "run", set_of(environment={"code": {"a": 1}, "weights": [1], "gpu": ["invented"]}))
    if masks:
        tp.sweep({**SWEEP, "strategies": "none"}, tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "accept-changes" not in text
    assert text.count("<dd>[&#39;invented&#39;]</dd>") == 1  # in its own environment
    assert "tokenprune None" not in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1366])
@pytest.mark.parametrize("which", ["alone", "both"])
def test_in_a_browser(browser: Any, request: pytest.FixtureRequest, which: str, width: int) -> None:
    folder: Path = request.getfixturevalue(which)
    problems: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("#plot-answers .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#answer-table tbody tr").count() == 5
    assert page.locator("#answer-table tbody tr").nth(1).inner_text().split()[:5] == ["fastv", "0.5", "32.0", "50", "%"]
    page.select_option("#answer-metric", "total")
    page.select_option("#answer-cost", "flops")
    assert page.text_content("#plot-answers .ytitle") == "total"
    assert "FLOPs" in page.text_content("#plot-answers .xtitle")
    if which == "both":
        page.select_option("#answer-group", label="some-model on questions (val, an-evaluator)")
        assert page.text_content("#plot-answers .ytitle") == "accuracy"
        page.wait_for_selector("#plot-tradeoff .main-svg")
        assert page.locator("#results tbody tr").count() == 3
    assert problems == []
    page.close()
