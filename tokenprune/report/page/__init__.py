"""The page of a sweep: one HTML file with plots, a table, paired differences and a gallery, and nothing to be fetched.

Goes here: from records and answers to the numbers of each section (`data`, `sections`, `answers`, `gallery`), its plots
(`plots`, `curves`), pictures (`pictures`) and the file (`html`, with its template, style and scripts in `parts/`).
Tables and figures for papers are in `report/tables` and `report/figures`.
"""
