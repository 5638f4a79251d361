"""PruneSID: groups of patches along principal directions, and the most attended distinct ones of each."""
