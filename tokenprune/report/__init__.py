"""Reports: files, plots and overlay pictures of an evaluation's results.

Goes here: what draws or writes. A file that `compare --out` writes is added to `write`; a new kind of picture is a
module of its own. Tables for terminals are in `evaluation/tables`.
"""

from __future__ import annotations
