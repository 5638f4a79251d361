"""The report of a sweep: its numbers are those of the store, and the page works in a browser."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.cli.app import main
from tokenprune.errors import UnsupportedError
from tokenprune.evaluation.records import stages_of
from tokenprune.evaluation.statistics import mean_interval, paired_difference, ratio_interval
from tokenprune.report import write_report
from tokenprune.report.figures import figures_of
from tokenprune.report.page import curves, gallery, pictures, plots
from tokenprune.report.page.data import Study, read_study
from tokenprune.report.page.html import _embedded
from tokenprune.report.pareto import front
from tokenprune.report.tables import as_latex, as_markdown, cells_of
from tokenprune.sweeps.store import FILE
from tokenprune.sweeps.summary import scenes_of

CONFIG: dict[str, Any] = {
    "models": "lisa-tiny",
    "datasets": "shapes",
    "strategies": ["none", "random", "csp", "fastv:layer=2"],
    "budgets": [0.5, 0.25],
    "limit": 9,
}
SINGLE, DOUBLE = 3.3, 6.9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tp.sweep(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def study(run: Path) -> Study:
    return read_study(run)


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    paths = write_report(run, folder / "new" / "report.html", folder / "tables", folder / "figures")
    assert paths[0] == folder / "new" / "report.html"
    assert sorted(paths) == sorted(path for path in folder.rglob("*") if path.is_file())
    return folder


@pytest.fixture(scope="module")
def data(written: Path) -> Any:
    return data_of(written / "new" / "report.html")


def data_of(path: Path) -> Any:
    """What the scripts of a page read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


# numbers -------------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_records(run: Path, data: Any) -> None:
    table = tp.read_results(run)
    parts = dict(iter(table.groupby("label", sort=False)))
    assert len(data["table"]) == len(parts) == 7
    reference = parts["none"]
    for row, (label, part) in zip(data["table"], parts.items(), strict=True):
        scenes = scenes_of(part)
        giou = mean_interval(part.iou.tolist(), scenes)
        ciou = ratio_interval(part.intersection.tolist(), part["union"].tolist(), scenes)
        assert row["giou"] == pytest.approx(giou.value, rel=1e-5)
        assert row["giou_interval"] == pytest.approx([giou.low, giou.high], rel=1e-5)
        assert row["ciou"] == pytest.approx(ciou.value, rel=1e-5)
        assert row["ciou_interval"] == pytest.approx([ciou.low, ciou.high], rel=1e-5)
        assert row["tokens"] == pytest.approx(part.equivalent_tokens.mean(), rel=1e-5)
        assert row["flops"] == pytest.approx(part.flops.mean(), rel=1e-5)
        assert row["kv"] == pytest.approx(part.kv_bytes.mean(), rel=1e-5)
        assert row["queries"] == len(part) == 9
        assert row["strategy"] in ("none", "random", "csp", "fastv (layer=2)")
        if label != "none":
            found = paired_difference(part.iou.tolist(), reference.iou.tolist(), scenes)
            assert row["difference"] == pytest.approx(found.value, abs=1e-6)
            assert row["difference_interval"] == pytest.approx([found.low, found.high], abs=1e-6)
            assert row["shown"] is found.shown
        else:
            assert row["difference"] is None


def test_plots_show_the_numbers_of_the_table(data: Any) -> None:
    (group,) = data["groups"]
    rows = {(row["strategy"], row["budget"]): row for row in data["table"]}
    costs = {"tokens": "share", "flops": "flops", "kv": "kv"}
    for metric in ("giou", "ciou"):
        for cost, key in costs.items():
            plot = group["tradeoff"][metric][cost]
            curves = {one["legendgroup"]: one for one in plot["data"] if one["meta"]["role"] == "curve"}
            bands = {one["legendgroup"]: one for one in plot["data"] if one["meta"]["role"] == "band"}
            assert [*curves] == [entry["name"] for entry in plot["legend"][:-1]]
            assert {*bands} == {"random", "csp", "fastv (layer=2)"}
            for method, curve in curves.items():
                budgets = [None] if method == "none" else [0.25, 0.5]
                mine = [rows[method, budget] for budget in budgets]
                assert curve["x"] == pytest.approx([row[key] for row in mine])
                assert curve["y"] == pytest.approx([row[metric] for row in mine])
                if method in bands:
                    (low, high), (_, top) = mine[0][f"{metric}_interval"], mine[1][f"{metric}_interval"]
                    assert bands[method]["y"][:2] == pytest.approx([high, top])
                    assert bands[method]["y"][-1] == pytest.approx(low)
            (edge,) = (one for one in plot["data"] if one["meta"]["role"] == "front")
            points = [(row[key], row[metric]) for row in data["table"]]
            assert list(zip(edge["x"], edge["y"], strict=True)) == front(points)


def test_layers_kinds_and_times(run: Path, data: Any) -> None:
    table = tp.read_results(run)
    (group,) = data["groups"]
    assert [part["budget"] for part in group["budgets"]] == [0.5, 0.25]
    part = table[table.label == "csp at 0.25"]
    at = group["budgets"][1]
    (layers,) = (one for one in at["layers"]["data"] if one["legendgroup"] == "csp")
    assert layers["y"][:-1] == pytest.approx(np.mean(part.layers.tolist(), axis=0).tolist(), rel=1e-5)
    for column in ("kind", "size"):
        (bars,) = (one for one in at[column]["data"] if one["legendgroup"] == "csp")
        means = part.groupby(column).iou.mean()
        assert {*bars["x"]} == {*means.index}
        assert bars["y"] == pytest.approx([means[name] for name in bars["x"]], rel=1e-5)
    steps = {one["legendgroup"]: one["x"][one["y"].index("csp at 0.25")] for one in at["times"]["data"]}
    assert {"vision tower", "prefill", "mask decoder"} <= {*steps}
    prefill = np.median([times["prefill"] for times in part.milliseconds])
    assert steps["prefill"] == pytest.approx(float(prefill), rel=1e-5)


def test_differences(run: Path, data: Any) -> None:
    table = tp.read_results(run)
    found = data["groups"][0]["budgets"][1]["matrix"]
    assert found["labels"] == ["none", "random", "csp", "fastv (layer=2)"]
    first, second = (table[table.label == f"{name} at 0.25"] for name in ("random", "csp"))
    expected = paired_difference(first.iou.tolist(), second.iou.tolist(), scenes_of(first))
    cell, other = found["cells"][1][2], found["cells"][2][1]
    assert cell["value"] == pytest.approx(expected.value, abs=1e-6)
    assert (cell["low"], cell["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (other["value"], other["low"], other["high"]) == pytest.approx((-cell["value"], -cell["high"], -cell["low"]))
    assert cell["p"] == pytest.approx(expected.p, rel=1e-5)
    assert cell["shown"] is other["shown"] is expected.shown
    assert found["cells"][1][1] is None


def test_further_series_are_grey_and_wait(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SERIES", 2)
    found = plots.tradeoff(study.groups[0], "giou", "tokens")
    assert [(entry["slot"], entry["on"]) for entry in found["legend"][:4]] == [
        (0, True),
        (1, True),
        (-1, False),
        (-1, False),
    ]
    assert all(one["visible"] is False for one in found["data"] if one["meta"]["slot"] == -1)


def test_the_pareto_front() -> None:
    assert front([(2, 0.5), (1, 0.5), (1, 0.4), (3, 0.5), (4, 0.9), (5, 0.8)]) == [(1, 0.5), (4, 0.9)]


# the file ------------------------------------------------------------------------------------------------------------


def test_one_file_without_a_network(written: Path) -> None:
    path = written / "new" / "report.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 12e6
    assert text.count("plotly.js v") == 1
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?!data:)", text) == []
    for part in ("lisa-tiny", "shapes (val, forced)", tp.__version__, "gIoU", "Pareto front"):
        assert part in text


def test_data_cannot_end_its_script() -> None:
    text = _embedded({"text": "</script><!-- & “x”", "one": 1 / 3})
    assert "<" not in text
    assert json.loads(text) == {"text": "</script><!-- & “x”", "one": 0.333333}


def test_an_existing_file_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(SystemExit) as done:
        main(["report", str(run), "--out", str(tmp_path / "report.html"), "--tables", str(tmp_path / "a" / "b")])
    assert not done.value.code
    assert "lisa-tiny" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"results.csv", "results.md", "results.tex"}


# gallery -------------------------------------------------------------------------------------------------------------


def test_the_gallery_has_the_worst_and_the_largest_differences(run: Path, study: Study, data: Any) -> None:
    (found,) = data["gallery"]
    table = tp.read_results(run)
    labels = list(dict.fromkeys(table.label))
    assert found["labels"] == labels
    for label, values in zip(labels, found["ious"], strict=True):
        assert values == pytest.approx(table[table.label == label].iou.tolist(), abs=1e-4)
    (group,) = study.groups
    ious = gallery.iou_table(group)
    keys = gallery.chosen(group, ious, 5)
    assert len(keys) == 5
    worst = {ious[label].to_numpy().argmin() for label in labels}
    assert {ious.index[place] for place in worst} <= {*gallery.chosen(group, ious, 7)}
    assert len(found["samples"]) == 9  # all that there are
    gap = (ious["csp at 0.25"] - ious["none"]).abs().to_numpy()
    assert ious.index[gap.argmax()] in gallery.chosen(group, ious, 7 + 21)


def test_pictures_are_the_stored_masks_and_cells(run: Path, data: Any) -> None:
    table = tp.read_results(run)
    sample = data["gallery"][0]["samples"][0]
    row = table[table["sample"] == sample["name"]]
    assert sample["text"] == row.text.iloc[0]
    target = pixels(sample["target"])
    assert pixels(sample["image"]).shape == (256, 256, 3)
    for number, label in enumerate(data["gallery"][0]["labels"]):
        mask = pixels(sample["runs"][str(number)]["mask"])
        mine = row[row.label == label].iloc[0]
        assert int((mask & target).sum()) == mine.intersection
        assert int((mask | target).sum()) == mine["union"]
        stages = sample["runs"][str(number)]["stages"]
        assert (stages == []) is (label == "none")
        for stage in stages:
            assert stage["grid"] == [16, 16]
            assert stage["box"] == [0, 0, 1, 1]
            assert len(cells(stage["cells"])) == stage["kept"]
        if label.startswith("csp"):
            assert [stage["kept"] for stage in stages] == [mine.layers[stage["layer"]] for stage in stages]
            assert len(cells(stages[0]["parked"])) == 256 - stages[0]["kept"]


def pixels(uri: str) -> Any:
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def cells(text: str) -> list[int]:
    import base64

    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    return [int(place) for place in bits.nonzero()[0]]


def test_pictures_are_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert pixels(pictures.image_uri(rng.integers(0, 255, (900, 1200, 3), dtype=np.uint8))).shape == (360, 480, 3)
    mask = np.zeros((900, 1200), dtype=bool)
    mask[:450] = True
    small = pixels(pictures.mask_uri(mask))
    assert small.shape == (240, 320)
    assert (small[:120].all(), small[120:].any()) == (True, False)
    assert cells(pictures.packed_cells([0, 9, 10], 12)) == [0, 9, 10]


def test_stages_name_the_cells_of_merged_tokens() -> None:
    model = tp.load("lisa-tiny")
    scene = next(iter(tp.dataset("shapes").scenes("val", 4)))
    found = model.segment(scene.image, scene.queries[0].text, tp.strategy("prumerge+", budget=0.25))
    box = model.grid_box(*scene.image.shape[:2])
    for plain, stage in zip(stages_of(found.trace, 0, box), found.trace.stages, strict=True):
        places = stage.places()[0].nonzero().flatten().tolist()
        assert (plain["kept"] if plain["cells"] is None else plain["cells"]) == places
        assert plain["box"] == box


DATA = """
import numpy as np
from tokenprune.datasets.base import Dataset, Query, Scene


class Flat(Dataset):
    name, splits, kinds = "flat", ("val",), ("half",)

    def scenes(self, split, limit=None, seed=0):
        for number in range(2)[:limit]:
            image = np.zeros((64, 96, 3), dtype=np.uint8)
            image[:, 32:] = {shade}
            yield Scene(str(number), image, [Query("the bright half", "half", image[..., 0] > 0)])
"""


def test_data_that_is_gone_or_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "flat_data_of_a_report.py"
    module.write_text(DATA.format(shade=180))
    config = {**CONFIG, "datasets": f"{module.stem}:Flat", "strategies": ["none", "fastv"], "limit": 2}
    tp.sweep(config, tmp_path / "run")
    assert gallery.gallery_data(read_study(tmp_path / "run"))[0]["note"] == ""
    sys.modules.pop(module.stem)
    module.write_text(DATA.format(shade=90) + "\n# a file of another size\n")
    changed = "No pictures: scene '0' of .* is not the one that was run; its data changed"
    assert re.match(changed, gallery.gallery_data(read_study(tmp_path / "run"))[0]["note"])
    sys.modules.pop(module.stem)
    module.unlink()
    paths = write_report(tmp_path / "run", tmp_path / "report.html")
    (found,) = data_of(paths[0])["gallery"]
    assert found["samples"] == []
    assert found["note"].startswith("No pictures: ")
    assert "\n" not in found["note"]
    assert len(data_of(paths[0])["table"]) == 3


def test_without_masks(tmp_path: Path) -> None:
    tp.sweep({**CONFIG, "strategies": "none", "limit": 2}, tmp_path, keep_masks=False)
    found = gallery.gallery_data(read_study(tmp_path))
    assert found[0]["note"] == "No pictures: the sweep stored no masks (--no-masks)"
    write_report(tmp_path, tmp_path / "report.html", tmp_path, tmp_path)  # a single method without a budget
    assert (tmp_path / "layers-single.pdf").is_file()


# tables and figures --------------------------------------------------------------------------------------------------


def test_tables_hold_the_numbers(written: Path, data: Any) -> None:
    with (written / "tables" / "results.csv").open(encoding="utf-8") as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["none", "random", "csp", "fastv (layer=2)"]
    markdown = (written / "tables" / "results.md").read_text(encoding="utf-8")
    lines = [line.strip("| \n").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {1 + 3 * 4}
    texts = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    for row in data["table"]:
        at = "no budget" if row["budget"] is None else f"at {row['budget']:g}"
        for key, name in (("giou", "gIoU"), ("ciou", "cIoU")):
            mine = rows[row["strategy"]]
            ends = [float(mine[f"{name}{end}, {at}"]) for end in ("", " low", " high")]
            assert ends == pytest.approx([row[key], *row[f"{key}_interval"]], abs=1e-5)
            shown = texts[row["strategy"]][f"{name}, {at}"].replace("*", "")
            assert shown == f"{ends[0]:.3f} [{ends[1]:.3f}, {ends[2]:.3f}]"
    assert rows["none"]["gIoU, at 0.5"] == ""
    for budget in ("0.5", "0.25"):
        for name in ("gIoU", "cIoU"):
            column = f"{name}, at {budget}"
            values = {method: f"{float(row[column]):.3f}" for method, row in rows.items() if row[column]}
            bold = {method for method, row in texts.items() if row[column].startswith("**")}
            assert bold == {method for method, value in values.items() if value == max(values.values())}


def test_latex_is_whole(written: Path, study: Study) -> None:
    text = (written / "tables" / "results.tex").read_text(encoding="utf-8")
    assert text == as_latex(study)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    for line in body.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.count("&") == 8
    assert text.count("{") == text.count("}")
    assert text.count("$") % 2 == 0
    (group,) = study.groups
    cells_found = [cell for found in cells_of(group).values() for cell in found.values()]
    assert text.count(r"\mathbf") == sum(cell.best_giou + cell.best_ciou for cell in cells_found)
    for rule in (r"\toprule", r"\bottomrule", r"\end{tabular}"):
        assert text.count(rule) == 1


def test_figures_have_the_sizes_of_columns(written: Path) -> None:
    folder = written / "figures"
    names = {path.stem for path in folder.iterdir()}
    layers = {"layers-0_5-single", "layers-0_25-single", "layers-double"}
    assert names == {"tradeoff-giou-single", "tradeoff-ciou-single", "tradeoff-double", *layers}
    for name in names:
        width = SINGLE if name.endswith("single") else DOUBLE
        with Image.open(folder / f"{name}.png") as image:
            assert image.width == pytest.approx(width * 300, abs=1)
            assert image.info["dpi"][0] == pytest.approx(300, abs=0.1)
        points = re.search(r'<svg [^>]*?width="([\d.]+)pt"', (folder / f"{name}.svg").read_text(encoding="utf-8"))
        assert points is not None
        assert float(points[1]) == pytest.approx(width * 72, abs=0.1)
        box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ", (folder / f"{name}.pdf").read_bytes())
        assert box is not None
        assert float(box[1]) == pytest.approx(width * 72, abs=0.1)


def test_names_are_printed_as_they_are(study: Study) -> None:
    """On one line, and in figures without mathematics; also those that begin with an underscore."""
    (group,) = study.groups
    rows = [replace(row, method=f"_{row.method}\n\\input{{x}}|<b>$") for row in group.rows]
    group = replace(group, dataset="d\n\\input{x}|<b>$", rows=rows)
    latex = as_latex(replace(study, groups=[group]))
    assert [line for line in latex.splitlines() if r"\input" in line] == [
        r"% lisa-tiny on d \input{x}|<b>$ (val, forced), 9 queries"
    ]
    assert r"\_csp \textbackslash{}input\{x\}\textbar{}\textless{}b\textgreater{}\$ &" in latex
    lines = as_markdown(replace(study, groups=[group])).splitlines()
    assert lines[0] == r"## lisa-tiny on d \\input{x}\|&lt;b>$ (val, forced), 9 queries"
    assert len(lines) == 2 + 2 + 4
    assert lines[4].startswith(r"| _none \\input{x}\|&lt;b>$ | ")
    for figure in figures_of(group).values():
        (legend,) = figure.legends
        texts = legend.get_texts()
        assert [text.get_text() for text in texts] == [name.replace("\n", " ") for name in group.methods]
        assert not any(text.get_parse_math() for text in texts)


# errors --------------------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["report", *words])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_errors_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "report.html")
    assert "holds no results of a sweep" in told(capsys, str(tmp_path / "none"), "--out", out)
    shutil.copytree(run, tmp_path / "empty")
    with sqlite3.connect(tmp_path / "empty" / FILE) as connection:
        connection.execute("DELETE FROM records")
    connection.close()
    assert "holds no records yet; run the sweep" in told(capsys, str(tmp_path / "empty"), "--out", out)
    assert "is a folder; give the path of an HTML file" in told(capsys, str(run), "--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "cannot be made" in told(capsys, str(run), "--out", str(tmp_path / "file" / "report.html"))
    assert "cannot be made" in told(capsys, str(run), "--out", out, "--tables", str(tmp_path / "file"))
    assert not Path(out).exists()
    hidden = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else hidden(name, *rest)
    )
    line = told(capsys, str(run), "--out", out)
    assert line.endswith(
        'made with plotly, which is not installed; install the extra: pip install "tokenprune-vlm[report]"'
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UnsupportedError, match="pandas, plotly, jinja2, matplotlib, which are not installed"):
        write_report(run, out, figures=tmp_path)


# in a browser --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser: Any, written: Path, data: Any, width: int, scheme: str) -> None:
    problems: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: None if asked.url[:5] in ("file:", "data:") else problems.append(asked.url))
    page.goto((written / "new" / "report.html").as_uri())
    page.wait_for_selector("#plot-tradeoff .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == width

    rows = page.locator("#results tbody tr")
    assert rows.count() == 7
    page.click("#results th[data-key=giou] button")
    values = [float(text) for text in column(page, "giou")]
    assert values == sorted(values, reverse=True)
    page.click("#results th[data-key=giou] button")
    assert [float(text) for text in column(page, "giou")] == sorted(values)
    page.fill("#find", "LAYER 0.25")
    assert rows.count() == 1
    assert page.inner_text("#count") == "1 of 7 rows"
    page.fill("#find", "")
    page.select_option("#by-budget", "0.5")
    assert rows.count() == 3

    page.select_option("#metric", "ciou")
    page.select_option("#cost", "flops")
    assert "FLOPs" in page.text_content("#plot-tradeoff .xtitle")
    drawn = "document.querySelectorAll('#plot-tradeoff .scatterlayer .trace').length"
    before = page.evaluate(drawn)
    page.locator("#tradeoff .legend button", has_text="csp").click()
    assert page.evaluate(drawn) == before - 2  # curve and band
    page.select_option("#budget", label="0.25")
    assert page.inner_text("#matrix thead").split() == ["none", "random", "csp", "fastv", "(layer=2)"]
    assert "at budget 0.25" in page.inner_text("#layers .note")

    labels, ious = data["gallery"][0]["labels"], np.array(data["gallery"][0]["ious"])
    first, second = labels.index("fastv (layer=2) at 0.25"), labels.index("none")
    names = [sample["name"] for sample in sorted(data["gallery"][0]["samples"], key=lambda sample: sample["place"])]
    page.select_option("#first", label=labels[first])
    page.select_option("#per-page", "12")
    assert shown(page) == [names[place] for place in np.argsort(ious[first], kind="stable")]
    page.select_option("#mode", "against")
    page.select_option("#second", label="none")
    gap = np.round(np.abs(ious[first] - ious[second]), 9)
    assert shown(page) == [names[place] for place in np.argsort(-gap, kind="stable")]
    assert page.locator(".card").first.locator(".run").count() == 3  # the query, and two strategies
    page.check("#everyone")
    assert page.locator(".card").first.locator(".run").count() == 1 + 4
    page.wait_for_selector(".card canvas")
    page.select_option("#per-page", "3")
    assert page.inner_text("#page") == "page 1 of 3"
    page.click("#next")
    assert page.locator(".card .meta").first.inner_text().startswith("rank 4 of 9")
    page.wait_for_timeout(200)
    assert page.locator("figure", has_text="cannot be drawn").count() == 0
    assert problems == []
    page.close()


def column(page: Any, key: str) -> list[str]:
    """The values of a column of the table, without their intervals."""
    index = page.evaluate(
        f"[...document.querySelectorAll('#results th')].findIndex((one) => one.dataset.key === '{key}')"
    )
    texts = page.locator(f"#results tbody td:nth-child({index + 1})").all_inner_texts()
    return [text.split()[0] for text in texts]


def shown(page: Any) -> list[str]:
    """Names of the samples in the gallery."""
    return [text.split(" · ")[-3] for text in page.locator(".card .meta").all_inner_texts()]
