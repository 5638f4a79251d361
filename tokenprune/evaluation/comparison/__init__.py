"""`tokenprune.compare`: strategies side by side on one model and one dataset, in one process and one table.

Goes here: what a comparison adds to the records of `evaluation/`: rows, interleaved timing, tables. A figure of every
row is a field of `results.Row`, computed in `accumulator`, and a column of `tables`.
"""
