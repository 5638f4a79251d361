"""Evaluation: what a strategy costs and how good its masks are, query by query.

Goes here: what turns runs into numbers. `scene_run` runs strategies on one scene and gives `records`, of which
everything else is made: a `comparison/`, or a sweep (`tokenprune/sweeps/`). A metric of masks is a function in
`metrics`, what is counted per query belongs in `accounting`, and how queries are asked in `protocols`. Files and
pictures of the results are written by `report/`.
"""

from __future__ import annotations
