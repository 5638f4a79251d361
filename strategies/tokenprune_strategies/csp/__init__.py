"""CSP (cluster, scatter, prune): stages, clustering, instance masks and budgets."""
