"""The sequence that layers run on: which positions it has left, and their masks, tables, position ids and features.

Belongs here: conversions between full and shortened sequences, and what rows of a batch share.
"""
