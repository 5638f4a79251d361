"""How many processor threads to compute with: what was asked for, else what is allowed, else what proves faster.

Nothing here changes anything but `using`, which puts the number back when it is left. The command line opens it around
its own work; in Python it does nothing unless a number is given.
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
            "process" where nothing was chosen.
    """

    count: int
    chosen_by: str


def checked(count: int | None, name: str = "threads") -> int | None:
    """A number of threads that a user asked for.

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
    """The number for a command: `--threads`, else OMP_NUM_THREADS or MKL_NUM_THREADS, else a short probe.

    The probe compares one thread with as many as this process may use (cores that it may run on, CPU quota of its
    container), and never takes more than those.

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
    told = ", ".join(
        f"{count} {'thread' if count == 1 else 'threads'} {1e3 * s:.2f} ms" for count, s in seconds.items()
    )
    return ThreadChoice(best, f"probe: {told}")


def present() -> ThreadChoice:
    """What the process computes with now."""
    import torch

    return ThreadChoice(torch.get_num_threads(), "process")


@contextmanager
def using(threads: int | ThreadChoice | None) -> Iterator[ThreadChoice]:
    """Compute with that many threads while open, and with the former number afterwards; None changes nothing.

    PyTorch keeps one number for the process: work of other Python threads that begins meanwhile has it too.

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
    """The environment variable, with its value, that the user has set the number of threads with; None without one.

    Args:
        mkl: whether this build of PyTorch computes with MKL; elsewhere MKL_NUM_THREADS means nothing.
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
        membership: file that says which groups the process is in.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups(cgroups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min(cores, *(int(quota) for quota in quotas))) if quotas else cores


def probe(counts: tuple[int, ...], run: Callable[[int], float] | None = None) -> dict[int, float]:
    """Seconds of a small computation with each number of threads: medians over runs in turn, `SECONDS` in all.

    Args:
        counts: numbers to try.
        run: does the computation with so many threads and returns its seconds; replaced in tests.
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
    """A few products of the size that a layer of a small decoder has, which threads have to meet after each."""
    import torch

    with torch.inference_mode(), using(ThreadChoice(count, "probe")):
        states, weights = torch.ones(256, 512), torch.ones(512, 512)
        start = time.perf_counter()
        for _ in range(2):
            torch.nn.functional.silu(states @ weights)
        return time.perf_counter() - start


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the groups of this process and of all around them, which limit it as well."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (not controllers or "cpu" in controllers.split(",")):
            inner = Path(*(part for part in path.split("/") if part not in ("", "..")))
            # in a container the path may be that of the host, which is not there: the mount itself is its group then
            for root in {cgroups / controllers, cgroups / "cpu"} if controllers else {cgroups}:
                yield from (root / group for group in (inner, *inner.parents))


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that a group may use; None where it is not limited."""
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
