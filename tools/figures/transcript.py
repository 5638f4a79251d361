"""Run the commands of a page's `console` blocks in an empty folder, and write down what they print.

python tools/figures/transcript.py [PAGE]

All blocks of a page are one session. It runs in a virtual environment on top of the one that runs this file,
which stays as it is; pip takes nothing from the network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend" / "first-strategy.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "::: folder is "


@dataclass(frozen=True)
class Step:
    """A command and what it prints on stdout."""

    command: str
    output: str


def blocks(page: str) -> list[list[Step]]:
    """The steps of every `console` block of a page."""
    found = []
    for match in BLOCK.finditer(page):
        _, *parts = re.split(r"^\$ (.*)\n", match[1], flags=re.MULTILINE)
        found.append([Step(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)])
    return found


def run(session: list[list[Step]], folder: Path) -> list[list[Step]]:
    """The same steps with what they print now. Raises RuntimeError where a command fails."""
    variables, place = environment(folder / "environment"), folder / "work"
    place.mkdir()
    found = []
    for block in session:
        found.append([])
        for step in block:
            script = f"{step.command}\nstatus=$?\nprintf '\\n{MARK}%s' \"$PWD\"\nexit $status"
            done = subprocess.run(["bash", "-c", script], cwd=place, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"$ {step.command}\nfailed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
            output, _, now = done.stdout.rpartition(f"\n{MARK}")
            place = Path(now)
            lines = [line.rstrip() for line in output.strip("\n").splitlines()]
            found[-1].append(Step(step.command, "".join(f"{line}\n" for line in lines)))
    return found


def environment(folder: Path) -> dict[str, str]:
    """Variables of a fresh virtual environment on top of this one."""
    venv.create(folder)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    parent = sysconfig.get_path("purelib")
    Path(own, "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    program = folder / "bin" / "tokenprune"
    program.write_text(f"#!{folder / 'bin' / 'python'}\nfrom tokenprune.cli.app import main\n\nmain()\n")
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PIP", "FORCE_COLOR"))}
    return {
        **kept,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "110",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def stable(output: str) -> list[str]:
    """What does not change from run to run: words without numbers, widths, and how many tests there are."""
    text = re.sub(r"^=+ warnings summary.*?^-- Docs:[^\n]*\n", "", output, flags=re.MULTILINE | re.DOTALL)
    lines = []
    for line in text.splitlines():
        if not re.fullmatch(r"[.sx]+ *\[ *\d+%\]", line.strip()):
            words = re.sub(r"\d+([.:]\d+)*", "#", line)
            words = re.sub(r"(, # (skipped|warnings?))* in #s.*$", "", words)
            lines.append(" ".join(re.sub(r"─+", "─", words).split()))
    return [line for line in lines if line]


def main() -> None:
    """Write the page anew."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        found = iter(run(blocks(page), Path(folder).resolve()))

    def block(match: re.Match[str]) -> str:
        return "```console\n" + "".join(f"$ {step.command}\n{step.output}" for step in next(found)) + "```"

    path.write_text(BLOCK.sub(block, page), encoding="utf-8")


if __name__ == "__main__":
    main()
