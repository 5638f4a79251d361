"""Runs tests under several releases of transformers: `python tools/try_transformers.py 5.0.0 -- tests/test_api.py`.

Each release gets a small virtual environment that takes everything else (torch above all) from the one that runs this
script. Prints one row of a Markdown table per release; what pytest said stays in FOLDER/VERSION.log.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(version: str, folder: Path) -> Path:
    """The interpreter of an environment with that release, made if need be."""
    home = folder / version
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home)
        packages = next((home / "lib").glob("python*/site-packages"))
        base = sysconfig.get_path("purelib")
        (packages / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", f"transformers=={version}"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return python


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="releases of transformers")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/try-transformers"), help="for environments and logs")
    own, rest = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, rest = own[:cut], own[cut + 1 :]
    given = parser.parse_args(own)
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "strategies", "adapters"))
    print("| transformers | result |\n| --- | --- |", flush=True)
    for version in given.versions:
        python = environment(version, given.folder)
        log = given.folder / f"{version}.log"
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            *rest,
        ]
        with log.open("w") as file:
            env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
            subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env, check=False)
        print(f"| {version} | {log.read_text().strip().splitlines()[-1].strip('= ')} |", flush=True)


if __name__ == "__main__":
    main()
