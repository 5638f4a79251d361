"""FEATHER: attention without the rotary embedding at two layers, and an even grid of tokens at the first."""
