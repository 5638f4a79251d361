"""Datasets that are read from the user's files.

Goes here: what they share (`path_dataset`: a path and options; `dataset`: a listing of the queries, then one image at a
time), the annotations that several
formats have in common, and a module or folder for each format, which `tokenprune.datasets.plugin` registers.
"""
