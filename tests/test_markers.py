"""The markers that tests/conftest.py sets, and the line that counts them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def reference(golden):
    return golden("some-method")


def test_compares(reference):
    raise AssertionError("there is no reference data here")


@pytest.mark.slow
def test_takes_long():
    pass


@pytest.mark.gpu
def test_computes_elsewhere(monkeypatch):
    pass


@pytest.mark.parametrize("device", ["gpu"])
def test_is_quick(device):
    pass
"""


def test_marked_tests_are_counted(tmp_path: Path) -> None:
    for name in ("conftest.py", "helpers/default_selection.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    golden\n")
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    @staticmethod\n    def is_available():\n        return False\n"
    )

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:tokenprune", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()

    lines = run("--strict-markers")
    assert "by marker: slow 1 passed; gpu 1 skipped; golden 1 skipped" in lines
    assert lines[-1].startswith("2 passed, 2 skipped")
    assert run("-m", "golden")[-1].startswith("1 skipped, 3 deselected")
    assert not [line for line in run("-k", "quick") if "by marker" in line]
