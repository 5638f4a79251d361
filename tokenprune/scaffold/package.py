"""The files of a new plugin package, rendered from `templates/` and written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path

from tokenprune import __version__
from tokenprune.errors import InputError
from tokenprune.plugins.hookspecs import HOOK_API
from tokenprune.scaffold.naming import Names
from tokenprune.utils.files import new_folder

COMMON = {
    "pyproject.toml": "common/pyproject.toml",
    ".gitignore": "common/gitignore",
    ".github/workflows/test.yml": "common/test.yml",
    "src/@{module}/__init__.py": "common/init.py",
}
KIND = {
    "strategies": {
        "README.md": "strategy/README.md",
        "src/@{module}/plugin.py": "strategy/plugin.py",
        "src/@{module}/strategy.py": "strategy/strategy.py",
        "tests/test_@{identifier}.py": "strategy/test.py",
    },
    "adapters": {
        "README.md": "adapter/README.md",
        "src/@{module}/plugin.py": "adapter/plugin.py",
        "src/@{module}/adapter.py": "adapter/adapter.py",
        "tests/test_@{identifier}.py": "adapter/test.py",
        "tests/tiny_@{identifier}.py": "adapter/tiny.py",
    },
    "datasets": {
        "README.md": "dataset/README.md",
        "src/@{module}/plugin.py": "dataset/plugin.py",
        "src/@{module}/dataset.py": "dataset/dataset.py",
        "tests/test_@{identifier}.py": "dataset/test.py",
    },
}
MAIN = {
    "strategies": "strategy/strategy.py.tmpl",
    "adapters": "adapter/adapter.py.tmpl",
    "datasets": "dataset/dataset.py.tmpl",
}
DESCRIPTION = {
    "strategies": "Visual-token pruning by {}",
    "adapters": "Visual-token pruning for {} models",
    "datasets": "Images, queries and masks of {}, to compare visual-token pruning on",
}
DEPENDENCIES = {
    "strategies": ["torch>=2.6", "pydantic>=2.11"],
    "adapters": ["torch>=2.6", "transformers>=5.0"],
    "datasets": ["numpy>=1.26", "pillow>=10.3"],
}
TEST_DEPENDENCIES = {
    "strategies": ["hypothesis>=6.100", "pytest>=8.2"],
    "adapters": ["pytest>=8.2"],
    "datasets": ["pytest>=8.2"],
}
PLACE = re.compile(r"@\{([a-z_]+)\}")  # other "@" and "$", of decorators and workflows, stay as they are
AUTHOR = re.compile(r"(?P<name>[^<>]*[^<>\s])\s*<(?P<email>[^<>\s]+@[^<>\s]+)>")
LONGEST = 100  # characters of a description


@dataclass(frozen=True)
class Project:
    """The author's choices.

    Attributes:
        names: of the package.
        licence: an SPDX identifier with a text in `templates/licences`, or "none".
        author: "" or one line, "Ada Lovelace" or "Ada Lovelace <ada@example.org>".
        description: "" or one line of at most `LONGEST` characters.
        year: of the copyright.
    """

    names: Names
    licence: str = "Apache-2.0"
    author: str = ""
    description: str = ""
    year: int = 0

    def __post_init__(self) -> None:
        for field in ("author", "description"):
            text = getattr(self, field)
            if not text.isprintable():
                raise InputError(f"{field} {text!r} cannot be used; expected one line of printable characters")
        if len(self.description) > LONGEST:
            found = f"description of {len(self.description)} characters found"
            raise InputError(f"{found}, expected at most {LONGEST}, as a list shows it; put more into README.md")

    def files(self) -> dict[str, str]:
        """The text of every file, by its path in the package."""
        kind = self.names.kind
        values = self._values(_read(MAIN[kind]))
        found = {
            _filled(path, values): _filled(_read(f"{template}.tmpl"), values)
            for path, template in {**COMMON, **KIND[kind]}.items()
        }
        found[f"src/{self.names.module}/py.typed"] = ""
        if self.licence != "none":
            found["LICENSE"] = _filled(_read(f"licences/{self.licence}.txt"), values)
        return {path: text.rstrip("\n") + "\n" if text else "" for path, text in sorted(found.items())}

    def _values(self, source: str) -> dict[str, str]:
        names = self.names
        description = self.description or DESCRIPTION[names.kind].format(names.name)
        person = AUTHOR.fullmatch(self.author)
        licensed = self.licence != "none"
        return {
            "name": names.name,
            "identifier": names.identifier,
            "distribution": names.distribution,
            "module": names.module,
            "class_name": names.class_name(source),
            "environment": names.environment,
            "binding_name": f"{names.camel}Binding",
            "kind_title": f"The {names.noun}",
            "version": __version__,
            "hook_api": ".".join(HOOK_API.split(".")[:2]),
            "description": description,
            "description_quoted": _quoted(description),
            "summary": repr(description) if '"' in description else _quoted(description),
            "dependencies": ", ".join(map(_quoted, DEPENDENCIES[names.kind])),
            "test_dependencies": ", ".join(map(_quoted, TEST_DEPENDENCIES[names.kind])),
            "licence_field": f'license = "{self.licence}"\nlicense-files = ["LICENSE"]\n' if licensed else "",
            "licence_note": f"\nLicence: {self.licence}." if licensed else "",
            "authors_field": f"authors = [{{ {_person(self.author, person)} }}]\n" if self.author else "",
            "holder": person["name"] if person else self.author or f"the authors of {names.distribution}",
            "year": str(self.year or date.today().year),
        }


def write(project: Project, into: Path) -> Path:
    """Write the package into a new folder of its name inside `into`; returns the folder.

    Raises:
        InputError: the folder exists, or cannot be written; then nothing is left behind.
    """
    texts = project.files()
    folder = into / project.names.distribution
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; choose another name, or another folder with --into")
    with new_folder(folder, "choose a folder with --into") as unfinished:
        for path, text in texts.items():
            target = unfinished / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
    return folder


def _read(path: str) -> str:
    return files("tokenprune.scaffold").joinpath("templates", *path.split("/")).read_text(encoding="utf-8")


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with every `@{name}` replaced."""
    return PLACE.sub(lambda found: values[found[1]], template)


def _quoted(text: str) -> str:
    """A string literal for TOML and Python."""
    return json.dumps(text, ensure_ascii=False)


def _person(author: str, parts: re.Match[str] | None) -> str:
    if parts is None:
        return f"name = {_quoted(author)}"
    return f"name = {_quoted(parts['name'])}, email = {_quoted(parts['email'])}"
