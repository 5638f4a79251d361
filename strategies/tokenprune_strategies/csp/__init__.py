"""CSP: cluster, scatter, prune. Its stages, how it clusters, the instance masks it may begin with, its budget."""
