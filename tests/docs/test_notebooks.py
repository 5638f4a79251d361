"""The notebooks of the docs: stored without outputs, and they run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PRINTED = {
    "compare-and-report": ["gIoU 0.", "report.html", "results.csv"],
    "first-strategy": ["centre at 0.35: 256 image tokens, 89 from layer 0", "uniform"],
    "inside-a-run": [
        "scatter  256 active",
        "equivalent tokens of 256",
        "prefill",
        "pruned inside: True - unchanged after: True",
    ],
}
PICTURES = {"compare-and-report": 1, "first-strategy": 1, "inside-a-run": 2}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: Any) -> list[Any]:
    """The cells with code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_linked_and_expected() -> None:
    assert [path.stem for path in NOTEBOOKS] == [*PRINTED] == [*PICTURES]
    page = (ROOT / "docs" / "get-started.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in page


@each_notebook
def test_stored_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in code_of(notebook):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@each_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install ipykernel")
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where a notebook puts its files
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_of(notebook) for output in cell["outputs"]]
    texts = [output["text"] for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout"]
    for expected in PRINTED[path.stem]:
        assert expected in "".join(texts)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == PICTURES[path.stem]
