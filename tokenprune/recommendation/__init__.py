"""Recommendation: which strategies save time on this machine, from how many image tokens on, and what is known of their
accuracy.

Goes here: what `tokenprune recommend` measures and concludes. `rounds` times prefills in turn, `intervals` says what
the times show, `decoders` makes what is timed, `known_accuracy` looks accuracies up. Metrics and datasets belong in
`evaluation/`.
"""

from __future__ import annotations
