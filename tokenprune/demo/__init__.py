"""The page of `tokenprune demo`: a picture, a query, and two strategies side by side.

Goes here: what the page offers (`offered`, `pictures`), what it runs (`run`), how a result looks (`view`), all of these
for the values of the controls (`session`), the controls (`page`) and the server (`server`). Only the last two know
Gradio. Numbers are those of `evaluation`, pictures those of `report.overlays`.
"""

from __future__ import annotations
