"""`tokenprune tune`: search the options of a strategy under a budget, and confirm the best on another split.

Goes here: the search space, the search, the confirmation and their result. Combinations run, and are stored, as the
configurations of a sweep.
"""

from __future__ import annotations

from tokenprune.sweeps.tuning.tuner import Phase, tune

__all__ = ["Phase", "tune"]
