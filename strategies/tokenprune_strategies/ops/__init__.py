"""Operations that several methods share, each from the paper that its docstring names: pure tensor functions.

Goes here: an operation that a second method needs. An operation of one paper stays in that paper's file.
"""
