"""What is misspelt is told before anything heavy is imported; what would be ignored is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_fixtures import Runner, assert_one_line, run
from PIL import Image

import tokenprune as tp
from tokenprune.errors import OptionError
from tokenprune.loading.device_names import check_device, check_dtype

__all__ = ["run"]  # the fixture

IMAGE = ("photo.png", "a ring")
MISSPELT: dict[tuple[str, ...], str] = {
    ("compare", "--model", "lisa-tinyy"): "did you mean 'lisa-tiny'",
    ("compare", "--model", "./none/here"): "no such folder",
    ("compare", "--dataset", "shapess"): "did you mean 'shapes'",
    ("compare", "--split", "vall"): "did you mean 'val'",
    ("compare", "--device", "cudaa"): "did you mean 'cuda'",
    ("compare", "--device", "cuda:x"): "device 'cuda:x' is unknown",
    ("compare", "--dtype", "float23"): "expected one of float32, bfloat16, float16",
    ("compare", "--vision-tower", "/none/here"): "vision tower '/none/here'",
    ("compare", "--strategies", "none,fastvv"): "did you mean 'fastv'",
    ("compare", "--strategies", "visionzip+fastvv:keep=2"): "did you mean 'fastv'",
    ("compare", "--metrics", "aera"): "unknown metric 'aera'",
    ("compare", "--budget", "0.35,half"): "expected numbers",
    ("compare", "--limit", "0"): "limit",
    ("compare", "--overlays", "2"): "--overlays has no effect without --out",
    ("segment", *IMAGE, "--out", "m.png", "--model", "lisa-tinyy"): "did you mean 'lisa-tiny'",
    ("segment", *IMAGE, "--out", "m.png", "--device", "cudaa"): "did you mean 'cuda'",
    ("segment", *IMAGE, "--out", "m.png", "--dtype", "half"): "dtype 'half'",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "fastvv"): "did you mean 'fastv'",
    ("segment", *IMAGE, "--out", "m.jpg"): "expected .png",
    ("segment", *IMAGE, "--out", "m.png", "--budget", "0.5"): "moves nothing for strategy 'none', which keeps all",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "csp:query"): "strategy 'csp': option 'query' found, expected",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "cspp:query=seg"): "did you mean 'csp'",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "csp:query=seg", "-o", "query=last"): "'query' is given twice",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "csp:budget=0.2"): "budget is not an option here",
    ("segment", "photo.png", "--out", "m.png"): "the query is missing; put it after the image: photo.png",
    ("segment", "*.png", "--out", "m.png"): "the query is missing",
    ("segment", "a ring", "--out", "m.png"): "only 'a ring' is given: the image is missing; put it first",
    ("segment", "photo.png", "the", "red", "ring", "--out", "m.png"): 'or put the query in quotes: "the red ring"',
    ("segment", ".", "ring", "--out", "new.png"): "output 'new.png' ends in .png, as a file does, and there may be",
    ("answer", "photo.png", "--model", "m"): "the question is missing; put it after the image: photo.png",
    ("answer", "photo.png", "What", "is", "it?", "--model", "m"): 'put the question in quotes: "What is it?"',
    ("compare", "--dataset", "mydata.Good"): "did you mean 'mydata:Good'",
    ("flops", "--layers", "2"): "give them all, or name the shape whose sizes they change",
    ("new", "strategy", "my-own", "--author", " "): "--author is empty",
    ("segment", *IMAGE, "--out", "m.png", "--overlay", "m.png"): "--overlay 'm.png' is the same file as --out",
    ("segment", *IMAGE, "--out", "photo.png"): "--out 'photo.png' is the same file as the image that is read",
    ("inspect", "--model", "lisa-tinyy"): "did you mean 'lisa-tiny'",
    ("inspect", "--dataset", "shapess"): "did you mean 'shapes'",
    ("inspect", "--device", "cudaa"): "did you mean 'cuda'",
    ("inspect", "--strategy", "fastvv"): "did you mean 'fastv'",
    ("inspect", "--index", "-1"): "index",
    ("inspect", *IMAGE, "--index", "0"): "--index has no effect with an image of your own",
    ("inspect", *IMAGE, "--dataset", "shapes"): "--dataset has no effect with an image of your own",
    ("inspect", *IMAGE, "--split", "val"): "--split has no effect with an image of your own",
    ("inspect", *IMAGE, "--seed", "1"): "--seed has no effect with an image of your own",
    ("inspect", "no.png", "a ring"): "image 'no.png': no such file",
    ("inspect", "http://a/b.png", "a ring"): "image 'http://a/b.png' is a URL, which is not fetched",
    ("segment", "http://a/b.png?x=1", "a ring", "--out", "m.png"): "image 'http://a/b.png?x=1' is a URL",
    ("segment", "photo.png", "red \udcff", "--out", "m.png"): r"query 'red \udcff' holds \udcff at character 4",
    ("answer", "photo.png", "red \udcff", "--model", "x"): r"question 'red \udcff' holds \udcff at character 4",
    ("inspect", *IMAGE, "--out", "photo.png"): "--out 'photo.png' is the same file as the image that is read",
    ("flops", "--strategy", "fastvv"): "did you mean 'fastv'",
    ("flops", "--convention", "fastv", "--logit-positions", "1"): "--logit-positions has no effect",
    ("new", "strategy", "fastv"): "exists already",
}
# options of strategies are known to their modules, which import torch: told before transformers and the model
OPTIONS: dict[tuple[str, ...], str] = {
    ("compare", "--strategies", "none,fastv:kep=1"): "did you mean 'keep'",
    ("compare", "--strategies", "blind:budget=0.5"): "'blind' has nothing that a budget could move",
    ("segment", *IMAGE, "--out", "m.png", "--strategy", "fastv", "-o", "kep=1"): "did you mean 'keep'",
    ("inspect", *IMAGE, "--strategy", "fastv", "-o", "seed=3"): "'seed' has no effect unless layer=0",
    ("inspect", "--strategy", "blind", "--budget", "0.5"): "'blind' has nothing that a budget could move",
    ("flops", "--strategy", "blind", "--budget", "0.5"): "'blind' has nothing that a budget could move",
    ("flops", "--strategy", "fastv", "--budget", "7"): "(0, 1]",
}
PROGRAM = """
import contextlib, io, json, sys
from tokenprune.cli.app import main

told = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
    heavy = {"torch", "transformers", "sklearn", "matplotlib"} & set(sys.modules)
    told.append((code, stream.getvalue(), sorted(heavy)))
print(json.dumps(told))
"""


def test_what_is_misspelt_is_told_before_torch_and_transformers_are_imported(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([list(arguments) for arguments in (*MISSPELT, *OPTIONS)]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    asked = {**MISSPELT, **OPTIONS}
    for (arguments, part), (code, message, heavy) in zip(asked.items(), json.loads(done.stdout), strict=True):
        assert code == 2, (arguments, message)
        assert heavy in ([], ["torch"] if arguments in OPTIONS else []), (arguments, message)
        assert message.startswith("error: "), arguments
        assert message.count("\n") == 1, arguments
        assert part in message, arguments
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps", "xpu:0", "meta"])
def test_names_of_devices(device: str) -> None:
    check_device(device)


@pytest.mark.parametrize("device", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda 1", "npu"])
def test_names_that_are_no_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.loading.device_names.metadata.entry_points", lambda group: [])
    with pytest.raises(OptionError, match=r"device .* is unknown"):
        check_device(device)


def test_a_package_that_adds_a_device_may_give_it_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.loading.device_names.metadata.entry_points", lambda group: [group])
    check_device("npu:3")


def test_every_known_device_and_format_is_torchs_own() -> None:
    import torch

    from tokenprune.loading.device_names import DEVICES, DTYPES

    assert [torch.device(name).type for name in DEVICES] == list(DEVICES)
    for name in DTYPES:
        check_dtype(f"torch.{name}")
        assert isinstance(getattr(torch, name), torch.dtype)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(OptionError, match=r"'cuda:2' requested, but torch finds only 'cuda:0' … 'cuda:1'; use"):
        tp.load("lisa-tiny", device="cuda:2")


def test_defaults_do_not_count_as_given(run: Runner, tmp_path: Path) -> None:
    Image.new("RGB", (36, 30)).save(tmp_path / "photo.png")
    own = ("inspect", tmp_path / "photo.png", "a thing", "--model", "fake", "--strategy", "front")
    assert run(*own, "--out", tmp_path / "own.png").code == 0
    assert_one_line(run(*own, "--seed", 0), "--seed has no effect with an image of your own; leave it out")
    assert run("flops", "--convention", "fastv").code == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("compare", "--model", "fake", "--out", "{tmp}/out"), "--out"),
        (("inspect", "--model", "fake", "--out", "{tmp}/sample.png"), "inspect"),
        (("segment", "photo.png", "a ring", "--out", "{tmp}/m.png", "--overlay", "{tmp}/o.png"), "--overlay"),
    ],
)
def test_what_draws_names_the_extra_where_matplotlib_is_missing(
    run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], what: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert_one_line(
        ran,
        f"{what} draws with matplotlib, which is not installed",
        'install the extra: pip install "tokenprune-vlm[report]"',
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fake-model"]


def test_a_comparison_without_pictures_needs_no_matplotlib(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fake = ("--model", "fake", "--dataset", "rectangles", "--strategies", "none", "--limit", 1, "--timing-samples", 0)
    ran = run("compare", *fake)
    assert ran.code == 0, ran.err
