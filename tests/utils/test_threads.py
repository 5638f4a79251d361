"""The number of processor threads: what is asked for, what is allowed, what a probe finds; and that it is put back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_fixtures import Runner, assert_one_line, run
from fake_segmentation import FakeData, FakeModel, Front

import tokenprune as tp
from tokenprune.errors import OptionError
from tokenprune.utils import threads
from tokenprune.utils.threads import ThreadChoice, allowed_cores

__all__ = ["run"]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores whose user has set nothing; the process computes with three threads."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "CGROUPS", Path("/nowhere"))
    monkeypatch.setattr(threads, "_matmul_seconds", lambda count: 0.01 / count)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def machine(folder: Path, membership: str, files: dict[str, str]) -> int:
    """Cores that the process may use under such control groups."""
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        (folder / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mount" / name).write_text(text)
    return allowed_cores(folder / "mount", folder / "membership")


V1 = "5:memory:/box\n4:cpu,cpuacct:/box/inner\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),  # three and a half: rounded down
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # of a group around it
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "200000 100000\n"}, 1),
        ("0::/docker/4f3a\n", {"cpu.max": "200000 100000\n"}, 2),  # the host's path, which a container has not
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "rubbish"}, 4),
        ("rubbish\n", {"cpu.max": "100000 100000\n"}, 4),
        (
            V1,
            {"cpu,cpuacct/box/inner/cpu.cfs_quota_us": "300000", "cpu,cpuacct/box/inner/cpu.cfs_period_us": "100000"},
            3,
        ),
        (V1, {"cpu/box/cpu.cfs_quota_us": "100000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 4),
        (V1, {"memory/box/cpu.cfs_quota_us": "100000\n", "memory/box/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_quotas_of_control_groups(membership: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert machine(tmp_path, membership, files) == cores


def test_cores_that_the_process_may_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3})
    assert machine(tmp_path, "0::/\n", {"cpu.max": "300000 100000\n"}) == 2


def test_the_probe_takes_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def busy(count: int) -> float:
        asked.append(count)
        return 0.01 * count

    monkeypatch.setattr(threads, "_matmul_seconds", busy)
    assert threads.choose() == ThreadChoice(1, "probe: 1 thread 10.00 ms, 3 threads 30.00 ms")
    assert set(asked) == {1, 3}  # no more than PyTorch itself would take
    monkeypatch.setattr(threads, "_matmul_seconds", lambda count: 0.01 / count)
    assert threads.choose().count == 3
    monkeypatch.setattr(threads, "_matmul_seconds", lambda count: 0.01)
    assert threads.choose().count == 1  # alike: the fewer


def test_a_slow_probe_ends_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(threads, "_matmul_seconds", lambda count: asked.append(count) or 10.0)
    assert threads.choose().count == 1
    assert asked == [1, 3, 1, 3]  # once to warm up


def test_no_probe_within_a_quota_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(threads, "allowed_cores", lambda: allowed_cores(tmp_path, tmp_path / "membership"))
    monkeypatch.setattr(threads, "_matmul_seconds", None)
    assert threads.choose() == ThreadChoice(1, "allowed cores: 1")


@pytest.mark.parametrize(
    ("variables", "mkl", "expected"),
    [
        ({"OMP_NUM_THREADS": "2"}, True, "OMP_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "4,2"}, True, "OMP_NUM_THREADS=4,2"),
        ({"MKL_NUM_THREADS": "2"}, True, "MKL_NUM_THREADS=2"),
        ({"MKL_NUM_THREADS": "2"}, False, None),  # which that build of PyTorch does not read
        ({"MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, True, "MKL_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "many"}, True, None),
        ({"OMP_NUM_THREADS": "0"}, True, None),
        ({"OMP_NUM_THREADS": ""}, True, None),
    ],
)
def test_environment_settings(
    variables: dict[str, str], mkl: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert threads.environment_setting(mkl) == expected


def test_a_setting_wins_over_the_probe_and_the_option_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_matmul_seconds", None)  # not to be called
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.choose() == ThreadChoice(3, "OMP_NUM_THREADS=3")  # what PyTorch has made of it
    assert threads.choose(2) == ThreadChoice(2, "--threads")


@pytest.mark.parametrize("count", [0, -1, 5, 2.0, "2", True])
def test_numbers_that_are_refused(count: object) -> None:
    with pytest.raises(OptionError, match=r"threads: .* found, expected a whole number from 1 to 4"):
        tp.compare(FakeModel(), FakeData(), ["none"], limit=1, timing_samples=0, threads=count)  # type: ignore[arg-type]


class Noting(Front):
    """Notes the number of threads that it runs with."""

    noted: list[int]

    def choose(self, stage, tokens):  # type: ignore[no-untyped-def]
        self.noted.append(torch.get_num_threads())
        return super().choose(stage, tokens)


def noting() -> Noting:
    strategy = Noting()
    strategy.noted = []
    return strategy


def test_compare_leaves_the_number_alone_unless_asked() -> None:
    for given, expected, told in ((None, 3, "process"), (2, 2, "threads="), (4, 4, "threads=")):
        strategy = noting()
        found = tp.compare(FakeModel(), FakeData(), [strategy], limit=1, timing_samples=0, threads=given)
        assert set(strategy.noted) == {expected}
        assert torch.get_num_threads() == 3
        assert (found.environment["threads"], found.environment["threads_chosen_by"]) == (expected, told)


def test_the_number_is_put_back_after_an_error() -> None:
    with pytest.raises(tp.TokenPruneError, match="no query found"):
        tp.compare(FakeModel(), Nothing(), ["none"], limit=1, threads=2)
    assert torch.get_num_threads() == 3


class Nothing(FakeData):
    """No scenes."""

    name = "nothing"

    def scenes(self, split, limit=None, seed=0):  # type: ignore[no-untyped-def]
        return iter(())


def test_compare_tells_how_its_threads_were_chosen(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("compare", "--model", "fake", "--dataset", "rectangles", "--strategies", "front")
    words += ("--limit", 1, "--timing-samples", 0, "--format", "json")
    ran = run(*words, "--threads", 2)
    assert ran.code == 0, ran.err
    environment = json.loads(ran.out)["environment"]
    assert (environment["threads"], environment["threads_chosen_by"]) == (2, "--threads")
    monkeypatch.setattr(threads, "_matmul_seconds", lambda count: 0.001 * count)
    environment = json.loads(run(*words).out)["environment"]
    told = "probe: 1 thread 1.00 ms, 3 threads 3.00 ms"
    assert (environment["threads"], environment["threads_chosen_by"]) == (1, told)
    assert torch.get_num_threads() == 3  # of this process, which the command line is not


@pytest.mark.parametrize("number", [0, 5])
def test_threads_that_a_command_refuses(number: int, run: Runner, tmp_path: Path) -> None:
    picture = tmp_path / "none.png"
    for words in (
        ("compare",),
        ("segment", picture, "thing", "--out", tmp_path / "m.png"),
        ("inspect",),
    ):
        ran = run(*words, "--model", "fake", "--threads", number)
        assert_one_line(ran, f"--threads: {number} found", "from 1 to 4")
