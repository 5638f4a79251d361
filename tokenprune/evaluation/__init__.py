"""Evaluation: metrics, timing, and the comparison of strategies on one model and one data set."""

from __future__ import annotations
