"""CSP: cluster, scatter, prune. Its stages, clustering, instance masks, and budget."""
