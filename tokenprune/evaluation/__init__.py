"""Evaluation: metrics, cost, timing, and the comparison of strategies on one model and one dataset.

Goes here: what turns runs into numbers. A metric of masks is a function in `metrics`, and a column in `results` and
`tables`; what is counted per query belongs in `accounting`. Files and pictures of the results are written by `report/`.
"""

from __future__ import annotations
