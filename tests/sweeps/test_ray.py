"""Sweeps on a local Ray cluster: the same records as in one process, also where a node or an actor dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_segmentation import FakePlugin
from sweep_processes import CONFIG, content, fake_package, finished, started, stored, until_stored

import tokenprune as tp
from tokenprune.errors import InputError, OptionError, UnknownNameError
from tokenprune.plugins import registry

RECORDS = 2 * 40 * 4


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InputError, match=r'Ray is not installed; install the extra: pip install "tokenprune-vlm\[ray\]"'
    ):
        tp.sweep({"models": "lisa-tiny", "datasets": "shapes", "strategies": "none"}, tmp_path, engine="ray")


def test_mistakes(tmp_path: Path) -> None:
    from tokenprune.sweeps.ray_engine import RayEngine

    with pytest.raises(OptionError, match=r"timeout=0 found, expected seconds"):
        RayEngine(timeout=0)
    with pytest.raises(UnknownNameError, match="unknown engine 'rey'; did you mean 'ray'"):
        tp.sweep({"models": "lisa-tiny", "datasets": "shapes", "strategies": "none"}, tmp_path, engine="rey")


# on a cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray", reason="Ray is not installed: pip install tokenprune-vlm[ray]")
    return fake_package(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[Path]:
    """The store of a run in this process."""
    folder = tmp_path_factory.mktemp("whole")
    registry.register_plugin(FakePlugin(tmp_path_factory.mktemp("fake-model")), "fakes")
    tp.sweep(CONFIG, folder, threads=1)
    yield folder
    registry.unregister_plugin("fakes")


@pytest.fixture
def cluster(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without devices of its own and two nodes of one core, connected."""
    import ray
    from ray.cluster_utils import Cluster

    helpers = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join(filter(None, (str(packages), helpers, os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)  # as if the package were installed on the nodes
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_same_records_where_a_node_dies(cluster: Any, tmp_path: Path, whole: Path) -> None:
    before: list[int] = []

    def progress(now: Any) -> None:
        if now.all_done >= RECORDS // 3 and not before:
            before.append(now.all_done)
            cluster.remove_node(cluster.nodes[0], allow_graceful=False)

    found = tp.sweep(CONFIG, tmp_path, progress=progress, engine="ray")
    assert before, "the sweep was over before the node was to die"
    assert (found.added, found.records) == (RECORDS, RECORDS)
    assert content(tmp_path) == content(whole)
    assert tp.sweep(CONFIG, tmp_path, engine="ray").added == 0


@pytest.mark.slow
def test_actors_that_die_or_hang_are_replaced(
    cluster: Any, packages: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune.sweeps.ray_engine import RayEngine

    lost: list[str] = []
    hit: list[int] = []
    original = RayEngine._lose

    def lose(self: Any, slot: Any, jobs: Any, error: Exception) -> None:
        lost.append(str(error))
        original(self, slot, jobs, error)

    def progress(now: Any) -> None:
        if len(hit) < 2 and now.all_done > (20, 80)[len(hit)]:
            hit.append(processes(packages)[0])
            os.kill(hit[-1], (signal.SIGKILL, signal.SIGSTOP)[len(hit) - 1])

    monkeypatch.setattr(RayEngine, "_lose", lose)
    try:
        found = tp.sweep(CONFIG, tmp_path, progress=progress, engine=RayEngine(timeout=20))
    finally:
        for process in hit:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
    assert found.added == RECORDS
    assert "took longer than 20 s" in lost
    assert len(lost) >= 2
    assert content(tmp_path) == content(whole)


def processes(packages: Path) -> list[int]:
    """Of the actors that run on the cluster of a test, which has the packages on its path."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            ours = str(packages).encode() in (folder / "environ").read_bytes()
            if ours and b"SceneActor" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_scene_that_kills_its_actors_is_named(cluster: Any, packages: Path, tmp_path: Path, whole: Path) -> None:
    (packages / "deadly.py").write_text(
        "import os, sys\n"
        "from fake_segmentation import FakeData\n\n\n"
        "class Deadly(FakeData):\n"
        "    def scenes(self, split, limit=None, seed=0):\n"
        "        for number, scene in enumerate(super().scenes(split, limit, seed)):\n"
        "            if number == 2 and 'default_worker' in sys.argv[0]:  # not in the driver, which counts\n"
        "                os._exit(1)\n"
        "            yield scene\n"
    )
    config = {**CONFIG, "datasets": "deadly:Deadly", "strategies": "whole", "seeds": 0}
    sys.path.insert(0, str(packages))
    try:
        with pytest.raises(InputError, match=r"scene 2: the actors that ran it were lost 3 times"):
            tp.sweep(config, tmp_path, engine="ray")
    finally:
        sys.path.remove(str(packages))
    assert stored(tmp_path) >= 2


@pytest.mark.slow
def test_the_command(packages: Path, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(str(CONFIG))
    command = ("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", "--engine", "ray")
    process = started(packages, *command)
    until_stored(process, tmp_path / "run", 8)
    process.send_signal(signal.SIGINT)
    code, err = finished(process)
    assert code == 130, err
    assert "the same command goes on from there" in err
    assert 0 < stored(tmp_path / "run") < RECORDS
    assert finished(started(packages, *command))[0] == 0
    assert content(tmp_path / "run") == content(whole)
