"""Reports: files, plots and overlay pictures of an evaluation's results.

Goes here: what draws or writes. A file that `compare --out` writes is added to `write`; a new kind of picture is a
module of its own. The report of a sweep is made by `page/`, with `tables` and `figures` for papers. Tables for
terminals are in `evaluation/tables`.
"""

from __future__ import annotations

from tokenprune.report.page.write import write_report as write_report
