"""Where the scenes of a sweep run: in this process, or by an engine of another module. Engines do not write."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from tokenprune.datasets.base import Dataset
from tokenprune.sweeps.config import SweepConfig
from tokenprune.sweeps.plan import Configuration, Group
from tokenprune.sweeps.worker import Models, SceneRecords, Worker

Scenes = Generator[SceneRecords, None, None]


@dataclass(frozen=True)
class Task:
    """What is to run of one group.

    Attributes:
        config: of the sweep.
        place: of the group among those of the sweep.
        group: itself.
        keep_masks: whether masks and stages are stored.
        pending: from the number of a scene and of its queries to the configurations that are missing. Asked in the
            order of scenes, as late as possible: what could not run meanwhile is no longer among them.
        data: the group's dataset, in this process; None = to be made.
    """

    config: SweepConfig
    place: int
    group: Group
    keep_masks: bool
    pending: Callable[[int, int], tuple[Configuration, ...]]
    data: Dataset | None = None


class Engine(Protocol):
    """Runs scenes; open while a sweep runs."""

    def __enter__(self) -> Engine:
        """Raises a TokenPruneError if it cannot be used here."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of models and devices."""

    def run(self, task: Task) -> Scenes:
        """Run what is pending, in any order, each scene once; closing the generator ends the work."""


class LocalEngine:
    """Scene by scene in this process."""

    def __init__(self) -> None:
        self._models = Models()

    def __enter__(self) -> LocalEngine:
        """Nothing is needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the model."""
        self._models = Models()

    def run(self, task: Task) -> Scenes:
        """See `Engine`."""
        worker = Worker(task.group, task.config.limit, keep_masks=task.keep_masks, models=self._models, data=task.data)
        for number, scene in worker.scenes(lambda number, queries: bool(task.pending(number, queries))):
            yield worker.run(number, scene, task.pending(number, len(scene.queries)))
