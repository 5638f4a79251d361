"""Evaluation: metrics, timing, and the comparison of strategies on one model and one dataset."""

from __future__ import annotations
