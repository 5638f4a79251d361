"""`.ci/publish_docs.sh` in a repository of its own: which sites it publishes, and where `latest` leads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# mike without the building: the branch gh-pages has versions.json, and `default`, where the site's own address leads.
MIKE = """#!{python} -IS
import json, subprocess, sys
from pathlib import Path

def git(*words, given=None):
    return subprocess.run(["git", *words], input=given, capture_output=True, text=True, check=True).stdout.strip()

def read():
    for branch in ("gh-pages", "origin/gh-pages"):
        if git("branch", "--all", "--list", branch):
            return branch, json.loads(git("show", branch + ":versions.json"))
    return None, {"versions": [], "default": None}

command, *words = sys.argv[1:]
branch, site = read()
if command == "list":
    assert words == ["--json"]
    print(json.dumps(site["versions"]))
    sys.exit()
properties = {}
if command == "deploy":
    if words[0] == "--prop-set-string":
        properties = dict([words[1].split("=")])
        del words[:2]
    if words[0] == "--update-aliases":
        del words[0]
        for version in site["versions"]:
            version["aliases"] = [alias for alias in version["aliases"] if alias not in words[1:]]
    old = [version for version in site["versions"] if version["version"] == words[0]]
    aliases = [alias for version in old for alias in version["aliases"]] + words[1:]
    new = {"version": words[0], "title": words[0], "aliases": aliases, "properties": properties}
    site["versions"] = [new, *(version for version in site["versions"] if version not in old)]
else:
    assert command == "set-default", command
    (site["default"],) = words
blob = git("hash-object", "-w", "--stdin", given=json.dumps(site))
tree = git("mktree", given="100644 blob " + blob + "\\tversions.json\\n")
parent = ["-p", branch] if branch else []
commit = git("commit-tree", tree, "-m", command, *parent)
git("update-ref", "refs/heads/gh-pages", commit)
meanwhile = Path("meanwhile")  # what another job pushes before this one does
if command == "deploy" and meanwhile.exists():
    other = meanwhile.read_text()
    meanwhile.unlink()
    blob = git("hash-object", "-w", "--stdin", given=other)
    tree = git("mktree", given="100644 blob " + blob + "\\tversions.json\\n")
    git("push", "origin", git("commit-tree", tree, "-m", "other", *parent) + ":refs/heads/gh-pages")
"""


class Site:
    """A repository, its remote, and what is published there."""

    def __init__(self, folder: Path) -> None:
        self.remote, self.repository = folder / "remote.git", folder / "repository"
        scripts, programs = self.repository / ".ci", folder / "bin"
        scripts.mkdir(parents=True)
        programs.mkdir()
        for name in ("publish_docs.sh", "site_alias.py"):
            shutil.copy(ROOT / ".ci" / name, scripts)
        (programs / "mike").write_text(MIKE.replace("{python}", sys.executable), encoding="utf-8")
        (programs / "mike").chmod(0o755)
        who = {
            f"GIT_{role}_{what}": "docs@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **who, "PATH": path, "PYTHON": sys.executable}
        self.git("init", "--quiet", "--bare", str(self.remote), cwd=folder)
        self.git("init", "--quiet", cwd=self.repository)
        self.git("remote", "add", "origin", str(self.remote), cwd=self.repository)

    def git(self, *words: str, cwd: Path) -> str:
        ran = subprocess.run(["git", *words], cwd=cwd, env=self.environment, capture_output=True, text=True, check=True)
        return ran.stdout

    def publish(self, *words: str) -> subprocess.CompletedProcess[str]:
        script = self.repository / ".ci" / "publish_docs.sh"
        return subprocess.run([script, *words], env=self.environment, capture_output=True, text=True, check=False)

    @property
    def stored(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.git("show", "gh-pages:versions.json", cwd=self.remote))
        return found

    @property
    def releases(self) -> dict[str, str | None]:
        return {one["version"]: one["properties"].get("release") for one in self.stored["versions"]}

    @property
    def leads(self) -> tuple[list[str], str]:
        """The versions with the alias `latest`, and where the site's own address leads."""
        versions = [one["version"] for one in self.stored["versions"] if "latest" in one["aliases"]]
        return versions, self.stored["default"]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def published(site: Site, *tags: str) -> None:
    for tag in tags:
        ran = site.publish(*[tag] * bool(tag))
        assert ran.returncode == 0, ran.stderr


def meanwhile(site: Site, stored: dict[str, Any]) -> None:
    """Let another job publish this while the next site is built."""
    (site.repository / "meanwhile").write_text(json.dumps(stored), encoding="utf-8")


def test_the_first_site_is_that_of_main(site: Site) -> None:
    published(site, "")
    assert (site.releases, site.leads) == ({"dev": None}, ([], "dev"))
    published(site, "v1.0.0", "")
    assert (site.releases, site.leads) == ({"dev": None, "1.0": "1.0.0"}, (["1.0"], "latest"))


def test_latest_is_the_highest_version(site: Site) -> None:
    published(site, "v1.1.4", "v1.2.0", "v1.1.5")
    assert (site.releases, site.leads) == ({"1.2": "1.2.0", "1.1": "1.1.5"}, (["1.2"], "latest"))
    published(site, "v1.10.0", "v1.9.3")  # 10 is more than 9
    assert site.leads == (["1.10"], "latest")
    published(site, "v1.10.1")
    assert (site.releases["1.10"], site.leads) == ("1.10.1", (["1.10"], "latest"))


def test_an_older_patch_does_not_replace_a_newer_one(site: Site) -> None:
    published(site, "v1.1.10")
    ran = site.publish("v1.1.9")
    assert (ran.returncode, ran.stdout) == (0, "v1.1.9 is older than the 1.1 that is published: nothing is published\n")
    assert site.releases == {"1.1": "1.1.10"}


def test_a_site_without_the_property_counts_as_its_version(site: Site) -> None:
    published(site, "v1.2.0")
    stored = site.stored
    stored["versions"][0]["properties"] = None
    meanwhile(site, stored)
    published(site, "v1.1.0", "v1.2.0")
    assert (site.releases, site.leads) == ({"1.2": "1.2.0", "1.1": "1.1.0"}, (["1.2"], "latest"))


@pytest.mark.parametrize("word", ["1.2.3", "v1.2", "v1.2.3.4", "main"])
def test_other_words_than_tags_of_releases_are_refused(site: Site, word: str) -> None:
    ran = site.publish(word)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"{word}: expected the tag of a release, such as v1.2.3, or no argument for the version dev\n"


def test_a_pre_release_has_no_site(site: Site) -> None:
    ran = site.publish("v1.3.0rc1")
    assert (ran.returncode, ran.stdout) == (0, "v1.3.0rc1 is a pre-release: no site is published\n")
    assert site.git("branch", "--list", cwd=site.remote) == ""


def test_what_another_job_publishes_meanwhile_stays(site: Site) -> None:
    published(site, "v1.1.0")
    other = {"version": "1.3", "title": "1.3", "aliases": ["latest"], "properties": {"release": "1.3.0"}}
    first = {**site.stored["versions"][0], "aliases": []}
    meanwhile(site, {"versions": [other, first], "default": "latest"})
    published(site, "v1.2.0")
    assert site.releases == {"1.2": "1.2.0", "1.3": "1.3.0", "1.1": "1.1.0"}
    assert site.leads == (["1.3"], "latest")


def test_a_push_that_is_refused_is_an_error(site: Site) -> None:
    hook = site.remote / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    hook.chmod(0o755)
    ran = site.publish("v1.0.0")
    assert ran.returncode == 1
    assert "gh-pages could not be pushed to origin" in ran.stderr


def test_a_tag_is_published_by_the_release_alone() -> None:
    docs, release = (
        yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
        for name in ("docs.yml", "release.yml")
    )
    assert docs[True]["push"] == {"branches": ["main"]}, "YAML reads the key `on` as true"
    assert release["jobs"]["site"]["needs"] == "publish"
    assert release["jobs"]["site"]["uses"] == "./.github/workflows/docs.yml"
