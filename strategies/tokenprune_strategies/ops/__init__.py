"""Operations that several methods share, each from the paper that its docstring names: pure tensor functions.

Goes here: what a second method needs. What one paper alone does stays in that paper's file.
"""
