"""Operations that several methods share: pure tensor functions.

Belongs here: an operation that a second method needs. Operations of a single method stay in its file.
"""
