"""The demo as its users have it: the command, and its page in a browser."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenprune.datasets.shapes import Shapes

pytestmark = pytest.mark.slow
SECONDS = 300
SETTLED = """before => {
    const signs = [...document.querySelectorAll('.wrap.generating, .progress-text, .eta-bar')];
    const busy = signs.some(one => one.checkVisibility());
    return !busy && document.querySelector('#numbers').innerText !== before;
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs gradio: pip install 'tokenprune-vlm[demo]'")
    command = [sys.executable, "-m", "tokenprune", "demo", "--port", "0", "--threads", "1"]
    folder = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line.startswith("lisa-tiny at http://127.0.0.1:"), line or started.communicate()[1]
            yield line.split()[2]
            started.send_signal(signal.SIGINT)
            out, err = started.communicate(timeout=SECONDS)
            assert (started.returncode, out, err) == (0, "", "")
            assert [*folder.glob("*demo*")] == []  # uploaded files are gone
        finally:
            started.kill()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page after its first run; what must not happen fails the test at its end."""
    problems: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SECONDS * 1000)
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else problems.append(asked.url)
    )
    opened.goto(url)
    opened.wait_for_selector("#side-b img")
    yield opened
    assert "Traceback" not in opened.inner_text("body")
    assert problems == []
    opened.close()


def mask(page: Any, letter: str) -> str:
    """The picture of a strategy's mask, as its address."""
    return str(page.locator(f"#side-{letter} img").first.get_attribute("src"))


def settle(page: Any, before: str) -> None:
    """Wait until there are other numbers, and nothing is running."""
    page.wait_for_function(SETTLED, arg=before)


def columns(page: Any) -> list[str]:
    """Headings of the table of numbers."""
    return list(page.locator("#numbers thead th").all_inner_texts())


def test_a_scene_and_a_slider(page: Any) -> None:
    assert columns(page) == ["without pruning", "csp at 0.35", "fastv at 0.35"]
    assert page.locator("#picture figcaption").first.inner_text() == "image"
    numbers, masks = page.inner_text("#numbers"), {letter: mask(page, letter) for letter in "ab"}
    assert "IoU with the target" in numbers
    slider = page.locator("#budget-a input[type=range]")
    slider.focus()
    for _ in range(25):
        slider.press("ArrowLeft")
    page.wait_for_selector("#numbers th >> text=csp at 0.1")
    settle(page, numbers)
    assert mask(page, "a") != masks["a"]
    assert mask(page, "b") == masks["b"]
    assert page.inner_text("#numbers") != numbers
    page.locator("#budget-b input[type=range]").press("Home")
    alert = page.wait_for_selector("#side-b [role=alert]")
    assert alert.inner_text().startswith("strategy 'fastv' cannot meet budget 0.01 ")
    assert columns(page) == ["without pruning", "csp at 0.1"]


def test_an_uploaded_picture(page: Any, tmp_path: Path) -> None:
    numbers = page.inner_text("#numbers")
    scene = list(islice(Shapes().scenes("val"), 30))[-1]
    Image.fromarray(scene.image).save(tmp_path / "photo.png")
    page.fill("#query textarea", scene.queries[0].text)
    page.set_input_files("#file input[type=file]", tmp_path / "photo.png")
    settle(page, numbers)
    for part in ("picture", "numbers", "side-a", "side-b"):
        assert "IoU" not in page.inner_text(f"#{part}")
    assert "agreement" in page.inner_text("#numbers")
    first, numbers = mask(page, "a"), page.inner_text("#numbers")
    page.fill("#query textarea", scene.queries[-1].text)
    page.locator("#query textarea").press("Enter")
    settle(page, numbers)
    assert mask(page, "a") != first
    (tmp_path / "bad.png").write_text("text")
    page.locator("#file").get_by_role("button", name="Clear").or_(
        page.locator("#file [aria-label*=emove]")
    ).first.click()
    page.set_input_files("#file input[type=file]", tmp_path / "bad.png")
    alert = page.wait_for_selector("#picture [role=alert] >> text=bad.png")
    assert "is not an image that PIL can read" in alert.inner_text()


def test_strategies_and_options(page: Any) -> None:
    page.fill("#strategy-b input", "cdpruner")  # needs what lisa-tiny does not have
    page.wait_for_timeout(300)
    assert "cdpruner" not in page.locator("[role=option]").all_inner_texts()
    page.fill("#strategy-b input", "csp-70")
    page.locator("[role=option] >> text=csp-70").click()
    page.wait_for_selector("#numbers th >> text=csp-70 at 0.3")
    assert page.locator("#budget-b input[type=range]").is_disabled()
    page.fill("#options-a textarea", "quary=seg")
    page.locator("#options-a textarea").press("Enter")
    alert = page.wait_for_selector("#side-a [role=alert]")
    assert "did you mean 'query'?" in alert.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_curve(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.click("#draw")
    page.wait_for_selector("#curve .vega-embed")
    assert page.locator("#problems p").all_inner_texts()[0].startswith("strategy 'csp' cannot meet budget 0.05")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.fill("#query textarea", "the red ring")
    page.wait_for_selector("#curve .vega-embed", state="detached")  # it was another query's
