"""How `publish_docs.sh` publishes a site, in one word: `mike list --json | site_alias.py TAG`; TAG is empty for `dev`.

- `latest`: as its minor version, which becomes `latest`;
- `version`: as its minor version; `latest` stays where it is, at a higher one;
- `older`: not at all, since a newer patch of that version is published;
- `dev`; or `dev-default`, where the site's own address leads as long as nothing has the alias `latest`.

The property `release` of a published version has its patch, such as 1.2.3 for `1.2`. Git's tags are not looked at:
a tag may have been refused.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def choice(versions: list[dict[str, Any]], tag: str) -> str:
    if not tag:
        return "dev" if any("latest" in version["aliases"] for version in versions) else "dev-default"
    new = numbers(tag.removeprefix("v"))
    released = [
        numbers((version.get("properties") or {}).get("release", version["version"]))
        for version in versions
        if re.fullmatch(r"\d+\.\d+", version["version"])
    ]
    if any(one[:2] == new[:2] and one > new for one in released):
        return "older"
    return "latest" if new >= max(released, default=new) else "version"


print(choice(json.load(sys.stdin), sys.argv[1]))
