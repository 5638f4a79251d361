"""How patches of a vision tower become image tokens, in the models of transformers."""
