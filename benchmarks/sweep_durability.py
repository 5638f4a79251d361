"""A sweep that is killed again and again against one that nothing disturbed: the stored records must be the same.

Both run as the real command. The first runs to its end. The second is killed with SIGKILL, half of the times at a
random moment, half of the times while a scene's records are being written, and started again by the same command. Then
every column of every record, scene and configuration is compared, but for times and environments.

    python benchmarks/sweep_durability.py [--kills 20] [--limit 500] [--folder durability] [--json durability.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

STRATEGIES = "none,random,uniform,csp,fastv,prumerge+"
BUDGETS = "0.5,0.35,0.25,0.15"
OF_THE_RUN = {"milliseconds", "environment"}
# The command, which dies before it writes the n-th record; 0: it does not.
DYING = """
import os, signal, sqlite3, sys

left, opened = int(sys.argv.pop(1)), sqlite3.connect

def count(statement):
    global left
    left -= statement.startswith("INSERT OR REPLACE INTO records")
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def connect(*arguments, **options):
    connection = opened(*arguments, **options)
    if left:
        connection.set_trace_callback(count)
    return connection

sqlite3.connect = connect
from tokenprune.cli.app import main
main(sys.argv[1:])
"""


def started(config: Path, out: Path, dying: int = 0) -> subprocess.Popen[bytes]:
    """The command as a process."""
    arguments = [str(dying), "sweep", str(config), "--out", str(out), "--threads", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", DYING, *arguments], **quiet)  # type: ignore[call-overload]


def stored(folder: Path) -> int:
    """Records in a store, while another process may write to it."""
    path = folder / "results.sqlite"
    if not path.is_file():
        return 0
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
        try:
            return int(connection.execute("SELECT COUNT(*) FROM records").fetchone()[0])
        except sqlite3.OperationalError:  # no tables yet
            return 0


def content(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of a store, but for what differs between two runs of the same sweep."""
    found: dict[str, list[tuple[object, ...]]] = {}
    with closing(sqlite3.connect(folder / "results.sqlite")) as connection:
        for table in ("configurations", "scenes", "records"):
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            columns = ", ".join(f'"{name}"' for name in names if name not in OF_THE_RUN)
            found[table] = connection.execute(f"SELECT {columns} FROM {table}").fetchall()
    return found


def run_killed(config: Path, out: Path, records: int, kills: int, draw: random.Random) -> list[int]:
    """Run a sweep that is killed, spread over its length; returns the records stored at each death."""
    deaths: list[int] = []
    for number in range(kills):
        target = int(records * (number + draw.random()) / (kills + 1))
        before = stored(out)
        if number % 2:
            process = started(config, out, dying=max(target - before, 0) + draw.randint(1, 40))
        else:
            process = started(config, out)
            while process.poll() is None and stored(out) < max(target, before + 1):
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 1))
            process.kill()
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"the run was to be killed, but ended by itself with code {process.returncode}")
        deaths.append(stored(out))
        print(f"kill {number + 1}: {deaths[-1]} of {records} records", file=sys.stderr, flush=True)
    if code := started(config, out).wait():
        sys.exit(f"the last run ended with code {code}")
    return deaths


def main() -> None:
    """Run both, compare, print; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=500, help="queries")
    parser.add_argument("--model", default="lisa-tiny")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--folder", type=Path, help="where both stores are kept; a run that is there is not repeated")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = given.folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        config = home / "sweep.json"
        keys = {"models": given.model, "datasets": given.dataset, "limit": given.limit}
        keys |= {"strategies": given.strategies.split(","), "budgets": [float(one) for one in given.budgets.split(",")]}
        config.write_text(json.dumps(keys), encoding="utf-8")
        seconds = []
        for out in (home / "whole", home / "killed"):
            start, before = time.perf_counter(), os.times()
            if out.name == "whole":
                if code := started(config, out).wait():
                    sys.exit(f"the run ended with code {code}")
                deaths = []
            else:
                deaths = run_killed(config, out, stored(home / "whole"), given.kills, random.Random(given.seed))
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            seconds.append({"wall": round(time.perf_counter() - start), "cpu": round(cpu)})
        one, other = (content(home / name) for name in ("whole", "killed"))
        result = {
            "records": len(one["records"]),
            "kills": len(deaths),
            "records_at_each": deaths,
            "missing_or_other": len(set(one["records"]) - set(other["records"])),
            "doubled_or_other": len(other["records"]) - len(set(one["records"]) & set(other["records"])),
            "same": one == other,
            "seconds_whole": seconds[0],
            "seconds_killed": seconds[1],
            **keys,
        }
    text = json.dumps(result, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if result["same"] else 1)


if __name__ == "__main__":
    main()
