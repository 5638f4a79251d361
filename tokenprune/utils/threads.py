"""The number of processor threads: as requested, else as allowed, else what a probe finds faster.

Only `using` changes the number, and restores it at its end. The command line uses it around its own work; in Python it
has no effect unless a number is given.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenprune.errors import OptionError
from tokenprune.utils.arguments import shown

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SECONDS = 0.12
"""What a probe may take, all runs together; the last runs may exceed it."""
ROUNDS = 25


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads, and why.

    Attributes:
        count: threads of one operation.
        chosen_by: "--threads", "threads=", the name of an environment variable, "probe: …", "allowed cores: 1", or
            "process" if nothing was chosen.
    """

    count: int
    chosen_by: str


def checked(count: int | None, name: str = "threads") -> int | None:
    """A number of threads that a user requested.

    Raises:
        OptionError: not a whole number from 1 to the machine's cores.
    """
    if count is None:
        return None
    cores = os.cpu_count() or 1
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= cores:
        plural = "core" if cores == 1 else "cores"
        raise OptionError(
            f"{name}: {shown(count)} found, expected a whole number from 1 to {cores}, this machine's {plural}"
        )
    return count


def choose(asked: int | None = None) -> ThreadChoice:
    """The number of threads of a command: `--threads`, else OMP_NUM_THREADS or MKL_NUM_THREADS, else a short probe.

    The probe compares one thread with as many as this process may use (its cores, the CPU quota of its container).

    Raises:
        OptionError: see `checked`.
    """
    import torch

    if checked(asked, "--threads") is not None:
        assert asked is not None
        return ThreadChoice(asked, "--threads")
    setting = environment_setting(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    if setting is not None:
        return ThreadChoice(torch.get_num_threads(), setting)  # torch has read it
    most = min(allowed_cores(), torch.get_num_threads())
    if most == 1:
        return ThreadChoice(1, "allowed cores: 1")
    seconds = probe((1, most))
    best = min(seconds, key=lambda count: (seconds[count], count))
    medians = ", ".join(
        f"{count} {'thread' if count == 1 else 'threads'} {1e3 * s:.2f} ms" for count, s in seconds.items()
    )
    return ThreadChoice(best, f"probe: {medians}")


def present() -> ThreadChoice:
    """The current number of threads of the process."""
    import torch

    return ThreadChoice(torch.get_num_threads(), "process")


@contextmanager
def using(threads: int | ThreadChoice | None) -> Iterator[ThreadChoice]:
    """Compute with that many threads, and restore the former number afterwards; None changes nothing.

    PyTorch has one number for the process: it also applies to other Python threads meanwhile.

    Raises:
        OptionError: see `checked`.
    """
    import torch

    if threads is None:
        yield present()
        return
    choice = threads if isinstance(threads, ThreadChoice) else ThreadChoice(checked(threads) or 1, "threads=")
    before = torch.get_num_threads()
    if choice.count != before:
        torch.set_num_threads(choice.count)
    try:
        yield choice
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def environment_setting(mkl: bool) -> str | None:
    """The environment variable, with its value, that sets the number of threads; None without one.

    Args:
        mkl: whether this build of PyTorch uses MKL; otherwise MKL_NUM_THREADS is ignored.
    """
    for name in (*(("MKL_NUM_THREADS",) if mkl else ()), "OMP_NUM_THREADS"):  # PyTorch's own order
        value = os.environ.get(name, "").strip()
        if re.fullmatch(r"[1-9]\d*(,\d+)*", value):
            return f"{name}={value}"
    return None


def allowed_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process can keep busy: those it may be scheduled on, and no more than its CPU quota, rounded
    down; at least 1.

    Args:
        cgroups: where control groups are mounted, version 1 or 2.
        membership: file that lists the groups of the process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(cgroups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min(cores, *(int(quota) for quota in quotas))) if quotas else cores


def probe(counts: tuple[int, ...], run: Callable[[int], float] | None = None) -> dict[int, float]:
    """Seconds of a small computation with each number of threads: medians over runs in turn, `SECONDS` in all.

    Args:
        counts: numbers to try.
        run: computes with that many threads and returns the seconds; replaced in tests.
    """
    run = run or _matmul_seconds
    spent = sum(run(count) for count in counts)  # threads are started, memory is touched
    taken: dict[int, list[float]] = {count: [] for count in counts}
    while not taken[counts[0]] or (spent < SECONDS and len(taken[counts[0]]) < ROUNDS):
        for count in counts:
            taken[count].append(run(count))
            spent += taken[count][-1]
    return {count: statistics.median(times) for count, times in taken.items()}


def _matmul_seconds(count: int) -> float:
    """A few matrix products of the size of a small decoder's layer; threads synchronise after each."""
    import torch

    with torch.inference_mode(), using(ThreadChoice(count, "probe")):
        states, weights = torch.ones(256, 512), torch.ones(512, 512)
        start = time.perf_counter()
        for _ in range(2):
            torch.nn.functional.silu(states @ weights)
        return time.perf_counter() - start


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the groups of this process and of their parents, which limit it as well."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (not controllers or "cpu" in controllers.split(",")):
            inner = Path(*(part for part in path.split("/") if part not in ("", "..")))
            # in a container the path may be the host's, which does not exist: then the mount is the group
            for root in {cgroups / controllers, cgroups / "cpu"} if controllers else {cgroups}:
                yield from (root / group for group in (inner, *inner.parents))


def _quota(folder: Path) -> float | None:
    """The number of cores that a group may use; None without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            return None if quota == "max" else int(quota) / int(period)
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
        )
        return None if int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
