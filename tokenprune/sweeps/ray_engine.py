"""Runs scenes on the devices of a Ray cluster: an actor on each device keeps its model, the driver alone writes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenprune.datasets.validation import counted_scenes
from tokenprune.errors import InputError, OptionError, TokenPruneError
from tokenprune.sweeps.config import SweepConfig
from tokenprune.sweeps.engines import Scenes, Task
from tokenprune.sweeps.plan import groups_of
from tokenprune.sweeps.worker import Models, SceneRecords, Worker
from tokenprune.utils.extras import install_extra

AHEAD = 2  # scenes that an actor holds: the one that it runs, and one so that it need not wait
TRIES = 3  # of a scene whose actors die
LOOK = 2.0  # seconds between looks at what the cluster has
TIMEOUT = 1800.0
START = 600.0  # seconds that the first actor may take


class SceneActor:
    """The process of one device.

    Args:
        config: of the sweep, as plain data.
        keep_masks: see `sweep`.
        folder: current one of the driver; relative paths and modules are looked for there.
        threads: processor threads; None = unchanged.
    """

    def __init__(self, config: dict[str, Any], keep_masks: bool, folder: str, threads: int | None) -> None:
        import torch

        if Path(folder).is_dir():
            os.chdir(folder)
            sys.path.insert(0, folder)
        if threads is not None:
            torch.set_num_threads(threads)
        self._config = SweepConfig.model_validate(config)
        self._groups, self._keep_masks = groups_of(self._config), keep_masks
        self._models, self._place = Models(), -1
        self._worker: Worker | None = None

    def node(self) -> str:
        """Address of the node: the actor is ready."""
        import ray

        return str(ray.util.get_node_ip_address())

    def run(self, place: int, number: int, hashes: list[str]) -> SceneRecords | TokenPruneError:
        """Run configurations of a group on one scene; an error of the user is given back, not raised."""
        try:
            group = self._groups[place]
            chosen = [one for one in group.configurations if one.hash in hashes]
            if len(chosen) < len(hashes):
                raise InputError(
                    f"node {self.node()} reads the configuration differently; install the same versions of tokenprune "
                    "and its plugins on all nodes"
                )
            if self._worker is None or place != self._place:
                self._worker = None  # lets go of the model
                where = f" on node {self.node()}"
                limit = self._config.limit
                self._worker = Worker(group, limit, keep_masks=self._keep_masks, models=self._models, where=where)
                self._place = place
            return self._worker.run(number, self._worker.scene(number), chosen)
        except TokenPruneError as error:
            return error


@dataclass
class Job:
    """A scene that an actor is to run."""

    number: int
    hashes: list[str]
    tries: int = 0


class Jobs:
    """What is to be handed out: first what comes back from actors that died, then the scenes of a task in order."""

    def __init__(self, task: Task) -> None:
        self._again: deque[Job] = deque()
        self._coming = self._of(task)

    def take(self) -> Job | None:
        """The next one; None = no more, until one comes back."""
        return self._again.popleft() if self._again else next(self._coming, None)

    def put_back(self, jobs: list[Job]) -> None:
        """To be taken again, in that order."""
        self._again.extendleft(reversed(jobs))

    def are_over(self) -> bool:
        """Whether none is left."""
        job = self.take()
        if job is not None:
            self.put_back([job])
        return job is None

    @staticmethod
    def _of(task: Task) -> Iterator[Job]:
        entry, limit = task.group.dataset, task.config.limit
        for number, queries in counted_scenes(entry.make(), entry.split, limit, task.group.seed):
            if pending := task.pending(number, queries):
                yield Job(number, [one.hash for one in pending])


@dataclass(eq=False)
class Slot:
    """An actor with the jobs that it was given, by their references; the first one is running since `since`."""

    actor: Any
    ready: Any
    is_ready: bool = False
    since: float = field(default_factory=time.monotonic)
    jobs: dict[Any, Job] = field(default_factory=dict)


class RayEngine:
    """An actor for each GPU of a cluster, or, for models on the CPU, for each `threads` cores.

    The cluster is the one that is connected to already, that at `address`, or a new one on this machine. Actors that
    die, with their nodes or alone, and those that take too long are replaced while there are devices; their scenes are
    run again, each at most three times.

    Args:
        address: of a running cluster, as for `ray.init`: "auto", or that of its head node.
        threads: processor threads of each actor; None = 1 on the CPU, and unchanged on a GPU.
        timeout: seconds that a scene may take, the loading of the model included.

    Raises:
        OptionError: a timeout that is not positive.
    """

    def __init__(self, address: str | None = None, *, threads: int | None = None, timeout: float = TIMEOUT) -> None:
        if not timeout > 0:
            raise OptionError(f"timeout={timeout!r} found, expected seconds, more than 0")
        self._address, self._threads, self._timeout = address, threads, timeout
        self._slots: list[Slot] = []
        self._on_gpu = self._started = False
        self._looked, self._failed_starts = 0.0, 0
        self._ray: Any = None

    def __enter__(self) -> RayEngine:
        """Connect. Raises InputError if Ray is not installed, or there is no cluster at the address."""
        try:
            import ray
        except ImportError:
            raise InputError(f'engine "ray": Ray is not installed; {install_extra("ray")}') from None
        self._ray = ray
        if ray.is_initialized():
            return self
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
        options: dict[str, Any] = {} if self._address else {"include_dashboard": False}
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            found = " ".join(str(error).split())[:160]
            raise InputError(
                f"no Ray cluster at {self._address or 'this machine'!r} ({found}); start one with `ray start --head`"
            ) from error
        self._started = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the actors, and the cluster or the connection if it was made here."""
        self._end(self._slots)
        if self._started:
            self._ray.shutdown()
            self._started = False

    def run(self, task: Task) -> Scenes:
        """See `Engine`.

        Raises:
            InputError: no device of the model's kind, no actor that starts, or a scene whose actors died three times.
        """
        on_gpu, jobs = self._device(task), Jobs(task)
        if on_gpu != self._on_gpu:
            self._end(self._slots)
        self._on_gpu = on_gpu
        try:
            while True:
                self._look(task)
                for slot in self._slots:
                    self._hand_out(slot, jobs, task.place)
                if not any(slot.jobs for slot in self._slots) and jobs.are_over():
                    return
                yield from self._collect(jobs)
        finally:  # another one goes on with those that are idle
            self._end([slot for slot in self._slots if slot.jobs])

    def _device(self, task: Task) -> bool:
        """Whether the model is for a GPU."""
        device = task.group.model.device or "cpu"
        if device.partition(":")[2]:
            raise OptionError(f"device {device!r}: every actor of a Ray cluster sees one GPU alone; write 'cuda'")
        if device == "cuda" and not self._ray.cluster_resources().get("GPU"):
            raise InputError("device 'cuda': the Ray cluster has no GPU; start its nodes with GPUs, or write 'cpu'")
        return device == "cuda"

    def _look(self, task: Task) -> None:
        """Make an actor for every device that has none."""
        if self._slots and time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        cores, found = self._threads or 1, self._ray.cluster_resources()
        devices = int(found.get("GPU", 0)) if self._on_gpu else int(found.get("CPU", 0)) // cores
        threads = self._threads if self._on_gpu else cores
        kind = self._ray.remote(SceneActor).options(num_cpus=cores, num_gpus=int(self._on_gpu))
        while len(self._slots) < max(devices, 1):
            actor = kind.remote(task.config.model_dump(mode="json"), task.keep_masks, os.getcwd(), threads)
            self._slots.append(Slot(actor, actor.node.remote()))

    def _hand_out(self, slot: Slot, jobs: Jobs, place: int) -> None:
        while slot.is_ready and len(slot.jobs) < AHEAD and (job := jobs.take()):
            if not slot.jobs:
                slot.since = time.monotonic()
            slot.jobs[slot.actor.run.remote(place, job.number, job.hashes)] = job

    def _collect(self, jobs: Jobs) -> Iterator[SceneRecords]:
        """Wait a moment for what actors give."""
        owners = {ref: slot for slot in self._slots for ref in (slot.jobs if slot.is_ready else (slot.ready,))}
        done, _ = self._ray.wait(list(owners), timeout=LOOK)
        for ref in done:
            slot = owners[ref]
            try:
                value = self._ray.get(ref, timeout=self._timeout)
            except self._ray.exceptions.RayError as error:
                self._lose(slot, jobs, error)
                continue
            slot.since = time.monotonic()
            if not slot.is_ready:
                slot.is_ready, self._failed_starts = True, 0
                continue
            del slot.jobs[ref]
            if isinstance(value, TokenPruneError):
                raise value
            yield value
        late = time.monotonic() - self._timeout
        for slot in [slot for slot in self._slots if slot.jobs and slot.since < late]:
            self._lose(slot, jobs, TimeoutError(f"took longer than {self._timeout:g} s"))
        early = time.monotonic() - START
        if all(not slot.is_ready and slot.since < early for slot in self._slots):
            raise InputError(
                f"no actor of the Ray cluster started within {START:g} s; see `ray status` for what it has free"
            )

    def _lose(self, slot: Slot, jobs: Jobs, error: Exception) -> None:
        """Take the jobs back from an actor that is dead or late."""
        self._end([slot])
        lost, why = list(slot.jobs.values()), _last_line(error)
        if not slot.is_ready:
            self._failed_starts += 1
            if self._failed_starts == TRIES:
                raise InputError(
                    f"no actor of the Ray cluster can start ({why}); check that tokenprune is installed on its nodes"
                ) from error
        elif lost:
            lost[0].tries += 1
            if lost[0].tries == TRIES:
                raise InputError(
                    f"scene {lost[0].number}: the actors that ran it were lost {TRIES} times (the last time: {why}); "
                    "see the logs of Ray; the same command goes on from what is stored"
                ) from error
        jobs.put_back(lost)

    def _end(self, slots: list[Slot]) -> None:
        for slot in list(slots):
            self._slots.remove(slot)
            with suppress(Exception):  # it may be gone already
                self._ray.kill(slot.actor)
        self._looked = 0.0


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
