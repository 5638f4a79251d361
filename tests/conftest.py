"""Fixtures and markers shared by all tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from default_selection import is_left_to_slow

pytest.register_assert_rewrite("segmentation_golden")

MARKERS = ("slow", "gpu", "golden")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")


def _shared(kind: str, variable: str, what: str) -> Callable[[str], Path]:
    """From a name to a folder of data that clones need not have, or to a skip that says where it was looked for."""
    default = Path(__file__).resolve().parents[2] / "shared" / kind
    root = Path(os.environ.get(variable, default))

    def folder(name: str) -> Path:
        found = root / name
        if not found.is_dir():
            pytest.skip(f"no {what} at {found}; set {variable} to the folder that holds {name!r}")
        return found

    return folder


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """Plugins that a test registers are those of this test alone."""
    from tokenprune.plugins import registry

    registry.reset()
    yield
    registry.reset()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium under Playwright; skips where one of them is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium on the path, as of apt-get install chromium")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """`golden("lisa")`: folder of that reference data."""
    return _shared("golden", "TOKENPRUNE_GOLDEN", "reference data")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("coco")`: folder of those photographs."""
    return _shared("data", "TOKENPRUNE_DATA", "photographs")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no cycles among what modules and tests are made of: all of it stays, and it took a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `golden` what uses the fixture, directly or through another one, and as `slow` what is left to it."""
    for item in items:
        if is_left_to_slow(item):
            item.add_marker(pytest.mark.slow)
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch finds none here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write a test's markers into its report; the keywords that are there hold names and ids of parameters as well."""
    report = yield
    report.markers = [marker for marker in MARKERS if item.get_closest_marker(marker) is not None]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that counts the marked tests that were selected, by what became of them."""
    found = {marker: Counter[str]() for marker in MARKERS}
    for outcome in OUTCOMES:  # those of a test that passed hold its call alone
        for report in terminalreporter.getreports(outcome):
            for marker in getattr(report, "markers", ()):  # a module that failed to be collected has none
                found[marker][outcome] += 1
    counts = [
        f"{marker} " + ", ".join(f"{number} {outcome}" for outcome, number in by_outcome.items())
        for marker, by_outcome in found.items()
        if by_outcome
    ]
    if counts:
        terminalreporter.write_line(f"by marker: {'; '.join(counts)}")
