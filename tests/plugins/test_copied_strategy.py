"""A copy of the built-in FastV, in a package of its own under another name, is FastV to the last bit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tokenprune_strategies

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "elsewhere"
version = "0.3"
requires-python = ">=3.10"
dependencies = ["tokenprune-vlm"]

[project.entry-points.tokenprune]
elsewhere = "elsewhere.plugin"

[tool.hatch.build.targets.wheel]
packages = ["elsewhere"]
"""

PLUGIN = """
from tokenprune import hookimpl

tokenprune_hook_api = "1.0"


@hookimpl
def tokenprune_register_strategies(register):
    register("quick", "elsewhere.quick:FastV", summary="FastV from elsewhere")
"""

COMPARED = """
import torch
import tokenprune as tp
from tokenprune.plugins import registry
from tokenprune.testing.tiny_decoders import tiny_llama

entry = tp.strategies()["quick"]
assert (entry.distribution, entry.version, entry.source.plugin) == ("elsewhere", "0.3", "elsewhere")
assert "elsewhere" in entry.load().__module__ and entry.load() is not tp.strategies()["fastv"].load()
assert not registry.broken_plugins() and not registry.collisions()

ids = torch.arange(72).reshape(3, 24) % 60 + 1
image = torch.zeros(3, 24, dtype=torch.bool)
image[0, 2:18], image[1, 1:8], image[2, 9:20] = True, True, True
mask_query = torch.zeros(3, 24, dtype=torch.bool)
mask_query[:, 21:23] = True
runs = 0
for attention in ("sdpa", "eager"):
    model = tiny_llama(6, kv_heads=2, attention=attention)
    for options in (
        {}, {"layer": 3, "keep": 5}, {"layer": 0, "seed": 7}, {"budget": 0.6},
        {"query": "last"}, {"query_reduce": "max"},
    ):
        found = []
        for name in ("fastv", "quick"):
            chosen = tp.strategy(name, **options)
            queries = {"queries": {"mask_query": mask_query}, "image_tokens": image, "seed": 3}
            with torch.no_grad(), tp.prune(model, chosen, **queries) as run:
                out = model(ids, use_cache=True)
            cache = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
            stages = [(s.layer, s.active, s.scores) for s in run.trace.stages]
            with torch.no_grad(), tp.prune(model, chosen, **queries):
                told = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
            found.append((out.logits, told, cache, stages, run.trace.ledger.equivalent_tokens))
        (logits, told, cache, stages, tokens), (logits2, told2, cache2, stages2, tokens2) = found
        assert torch.equal(logits, logits2) and torch.equal(told, told2) and tokens == tokens2
        assert all(torch.equal(a, b) for a, b in zip(cache, cache2, strict=True))
        for (layer, active, scores), (layer2, active2, scores2) in zip(stages, stages2, strict=True):
            assert layer == layer2 and torch.equal(active, active2) and torch.equal(scores, scores2)
        assert tokens < 16 and stages
        runs += 1
print("equal in", runs, "runs")
from tokenprune.cli.app import main
main(["list"])
"""


def test_fastv_in_a_package_of_its_own(tmp_path: Path) -> None:
    for needed in ("pip", "hatchling"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed here, which the package is built with")
    own = Path(next(iter(tokenprune_strategies.__path__)))
    package, target = tmp_path / "source" / "elsewhere", tmp_path / "installed"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(PLUGIN)
    for module, copy in (("fastv", "quick"), ("ops/even_and_random", "even_and_random")):
        text = (own / f"{module}.py").read_text(encoding="utf-8").replace("tokenprune_strategies.ops.", "elsewhere.")
        (package / f"{copy}.py").write_text(text.replace('name = "fastv"', 'name = "quick"'), encoding="utf-8")
        assert "tokenprune_strategies" not in (package / f"{copy}.py").read_text(encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(target), str(package.parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n{COMPARED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compared, listed = done.stdout.split("\n", 1)
    assert compared == "equal in 12 runs"
    assert "elsewhere 0.3" in listed
    assert "quick" in listed
