"""Reports: tables, plots and overlay pictures of what an evaluation found."""

from __future__ import annotations
