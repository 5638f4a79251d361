"""What the repository's own files say: workflows, issue forms, checkers, packaging, and the pages for contributors."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenprune import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads pyproject.toml only with the package tomli")

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")
PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "docs/design.md")),
    GITHUB / "pull_request_template.md",
]
BASES = (ROOT, ROOT / "strategies" / "tokenprune_strategies", ROOT / "adapters" / "tokenprune_adapters")
INPUTS = {"input", "textarea", "dropdown", "checkboxes"}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_form = pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


def test_every_file_is_there() -> None:
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "release"}
    assert {path.stem for path in FORMS} == {"bug", "new-method", "new-model-family"}


# workflows -----------------------------------------------------------------------------------------------------------


@each_workflow
def test_workflows_are_complete_and_ask_for_no_more_than_they_need(path: Path) -> None:
    workflow = read(path)
    assert workflow["name"] == path.stem
    assert workflow[True], "YAML reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "uses" in job:  # another workflow of this repository
            assert "workflow_call" in read(ROOT / job["uses"])[True]
        else:
            assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step


@each_workflow
def test_actions_are_pinned_to_a_major_version(path: Path) -> None:
    for step in steps(read(path)):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step


@each_workflow
def test_scripts_and_files_that_a_workflow_names_exist(path: Path) -> None:
    workflow = read(path)
    named: list[str] = []
    for step in steps(workflow):
        named += step.get("with", {}).get("cache-dependency-path", "").split()
        for line in step.get("run", "").splitlines():
            words = [word for word in shlex.split(line) if "$" not in word]
            if words and words[0].startswith("."):
                assert os.access(ROOT / words[0], os.X_OK), f"{path.name}: {words[0]} is no program"
            named += [word for word in words if word.endswith((".txt", ".toml", ".sh", ".py"))]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_matrix_is_what_the_package_says_it_runs_on() -> None:
    matrix = read(GITHUB / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    about = project()["project"]
    start = "Programming Language :: Python :: 3."
    assert [f"3.{text.removeprefix(start)}" for text in about["classifiers"] if text.startswith(start)] == matrix[
        "python"
    ]
    assert about["requires-python"] == f">={matrix['python'][0]}"
    assert {extra["python"] for extra in matrix["include"]} <= set(matrix["python"])


def test_dependabot_looks_at_what_there_is() -> None:
    found = read(GITHUB / "dependabot.yml")
    assert found["version"] == 2
    assert {update["package-ecosystem"] for update in found["updates"]} == {"pip", "github-actions"}
    for update in found["updates"]:
        assert (ROOT / update["directory"].lstrip("/")).is_dir()
        assert all((ROOT / path).exists() for path in update.get("exclude-paths", ()))


# issues --------------------------------------------------------------------------------------------------------------


@each_form
def test_issue_forms_have_what_github_requires(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    assert all(isinstance(form[key], str) for key in ("name", "description", "title"))
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in fields} <= INPUTS
    assert len({part["id"] for part in fields}) == len(fields)
    for part in form["body"]:
        if part["type"] == "markdown":
            assert part["attributes"]["value"].strip()
            continue
        assert part["attributes"]["label"]
        options = part["attributes"].get("options", [])
        assert bool(options) == (part["type"] in ("dropdown", "checkboxes"))
        texts = [option["label"] if isinstance(option, dict) else option for option in options]
        assert all(isinstance(text, str) for text in texts), (
            f"{texts}: YAML reads yes and no without quotes as truth values"
        )
        assert len(set(texts)) == len(texts)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_the_chooser_leads_elsewhere_too() -> None:
    found = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert found["blank_issues_enabled"] is False
    assert all(
        set(link) == {"name", "url", "about"} and link["url"].startswith("https://") for link in found["contact_links"]
    )


# checkers, packaging -------------------------------------------------------------------------------------------------


def test_the_checkers_of_a_commit_are_in_the_development_environment() -> None:
    repositories = read(ROOT / ".pre-commit-config.yaml")["repos"]
    (local,) = [one for one in repositories if one["repo"] == "local"]
    (standard,) = [one for one in repositories if one["repo"] != "local"]
    programs = {"lint-imports": "import-linter"}
    installed = {
        re.split(r"[<>=\[]", requirement)[0] for requirement in project()["project"]["optional-dependencies"]["dev"]
    }
    for hook in local["hooks"]:
        program = hook["entry"].split()[0]
        assert programs.get(program, program) in installed, hook
        assert f"/{program}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8"), f".ci/run does not run {program}"
    assert {"end-of-file-fixer", "trailing-whitespace", "check-yaml", "check-toml", "check-merge-conflict"} <= {
        hook["id"] for hook in standard["hooks"]
    }


def test_the_citation_is_of_this_version() -> None:
    citation, about = read(ROOT / "CITATION.cff"), project()["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == about["license"]
    assert citation["repository-code"] == about["urls"]["Repository"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in about["authors"]]


def test_the_sdist_has_all_that_is_named_for_it() -> None:
    for pattern in project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert list(ROOT.glob(pattern.lstrip("/"))), pattern


INSTALLED = re.compile(r"pip3? install [^\n`;&|]*(?<![\w./-])tokenprune(?![\w./-])")
REQUIRED = re.compile(r"[\"']tokenprune(\[|\s*[<>=~!])")


def test_nothing_installs_the_package_of_the_same_name_that_is_not_ours() -> None:
    """`tokenprune` on the package index is another project; the distribution is `tokenprune-vlm`."""
    suffixes = {".md", ".py", ".sh", ".tmpl", ".toml", ".txt", ".yml"}
    folders = ("tokenprune", "strategies", "adapters", "docs", "examples", "tools", "benchmarks", ".github", ".ci")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    texts += [path for path in ROOT.iterdir() if path.suffix in suffixes] + [ROOT / ".ci" / "run"]
    assert len(texts) > 200
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in texts
        for pattern in (INSTALLED, REQUIRED)
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == {}
    assert INSTALLED.search("pip install -U tokenprune")
    assert REQUIRED.search('dependencies = ["tokenprune>=0.1"]')
    assert not INSTALLED.search("pip install 'tokenprune-vlm[test]'")


# pages for contributors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_and_folders_that_a_page_names_exist(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [span.removeprefix("./") for span in re.findall(r"`([^`\n]+)`", text)]
    named = [
        span
        for span in spans
        if re.fullmatch(r"[\w.-]+/|([\w.-]+/)+[\w.-]*|\w[\w.-]*\.(py|md|toml|yml|cff|txt|sh)", span)
    ]
    assert named
    assert [name for name in named if not any((base / name).exists() for base in BASES)] == []
