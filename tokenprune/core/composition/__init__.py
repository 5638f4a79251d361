"""Compositions, `a+b`: strategies that run one after the other, each on what the one before it kept.

Goes here: the composition itself (`sequence`), and the view of the tokens that a part sees (`remaining_tokens`).
"""
