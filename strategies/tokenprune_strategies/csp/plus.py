"""CSP (https://arxiv.org/abs/2504.10854) with other defaults, found on lisa-tiny (ours), see docs/methods/csp.md."""

from __future__ import annotations

from pydantic import Field

from tokenprune.core.options import Amount, Depth
from tokenprune_strategies.csp.clustering import Clustering
from tokenprune_strategies.csp.csp import CSP

KEEP = 0.125


class CSPPlus(CSP):
    """Cluster, scatter, prune with all tokens in a single layer, which leaves more for the layers before and after it.

    Ours: the window [s, s + 1), twice as many representatives as kept tokens (four times in `csp`), and representatives
    that [CLS] attends to where the tower has one.
    """

    name = "csp+"
    shares = (CSP.shares[0], KEEP)

    class Options(CSP.Options):
        """Options of CSP with other defaults."""

        clustering: Clustering | None = Field(
            None,
            description="how representatives are chosen, see `clustering`; none = cls_attention, or grid if the tower "
            "has no [CLS]",
        )
        keep: Amount = Field(KEEP, description="N_p, number (int) or share (float) of tokens")
        prune_at: Depth | None = Field(
            None, description="p, layer (int) or share of the depth (float); none = s + 1, one layer with all tokens"
        )

    options: Options
