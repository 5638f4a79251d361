"""What the page asks for: from the values of its controls to what it shows. Errors of users become a line of HTML."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import torch

from tokenprune.core.strategy import Strategy
from tokenprune.demo import view
from tokenprune.demo.offered import Offer, offers_for, requested
from tokenprune.demo.pictures import Asked, about_file, about_scene, example_scenes
from tokenprune.demo.run import curve, once, one_line
from tokenprune.errors import InputError, TokenPruneError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.plugins.attribution import brief
from tokenprune.utils.threads import ThreadChoice


class Session:
    """A model, and the strategies and scenes that its page offers.

    The arguments of `show` and `draw` are the values of the controls: the name of a scene and the path of an uploaded
    file, of which the page sets one; the query; name, budget and options of each strategy.
    """

    def __init__(self, model: SegmentationModel, threads: ThreadChoice | None = None) -> None:
        self.model, self.threads = model, threads
        self.offers = offers_for(model)
        self.scenes = example_scenes()

    def query_of(self, scene: str) -> str:
        """The query that a scene comes with."""
        found, number = self.scenes[scene]
        return found.queries[number].text

    def show(self, scene: str | None, file: str | None, query: str, *sides: Any) -> tuple[str, ...]:
        """HTML of the picture, of the numbers, and of each strategy."""
        chosen = self._sides(sides)
        try:
            requests = [partial(requested, *one) for one in chosen]
            result = once(self.model, self._asked(scene, file, query), requests, self.threads)
            return view.picture(result), view.numbers(result), *(view.side(ran, result) for ran in result.sides)
        except (TokenPruneError, torch.OutOfMemoryError) as error:
            return view.message(_told(error)), "", *("" for _ in chosen)

    def draw(
        self, scene: str | None, file: str | None, query: str, *sides: Any
    ) -> tuple[pd.DataFrame | None, str, str]:
        """Points of the curve (strategy, budget, value), the name of the value, and HTML of what could not run."""
        try:
            asked = self._asked(scene, file, query)
            requests = [partial(_at_budget, offer, options) for offer, _, options in self._sides(sides)]
            points, problems = curve(self.model, asked, requests, self.threads)
        except (TokenPruneError, torch.OutOfMemoryError) as error:
            return None, "", view.message(_told(error))
        frame = pd.DataFrame([vars(point) for point in points]).sort_values(["strategy", "budget"], ignore_index=True)
        return frame, "gIoU" if asked.has_target else "agreement", view.notes(problems)

    def _asked(self, scene: str | None, file: str | None, query: str) -> Asked:
        if file is not None:
            return about_file(file, query)
        if scene is None:
            raise InputError("there is no picture; upload one, or choose a scene")
        return about_scene(self.scenes[scene][0], query)

    def _sides(self, values: tuple[Any, ...]) -> list[tuple[Offer, float, str]]:
        triples = zip(values[::3], values[1::3], values[2::3], strict=True)
        return [(self.offers[name], budget, options or "") for name, budget, options in triples]


def _at_budget(offer: Offer, options: str, budget: float) -> Strategy:
    return requested(offer, budget, options)


def _told(error: BaseException) -> str:
    return one_line(error) if isinstance(error, TokenPruneError) else brief(error)
