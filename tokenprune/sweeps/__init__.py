"""Sweeps: many configurations on whole datasets, stored sample by sample, and resumable at any moment.

Goes here: the configuration of a sweep, what it plans to run, the store with its records and answers, and the runs
themselves. What a single scene gives is in `evaluation/`; tables, plots and pages of a finished sweep are made by
`report/`.
"""
