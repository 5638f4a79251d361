"""`photo-strips`: photographs of Clothing Co-Parsing side by side, and queries that are true for one of the persons.

Goes here: the photographs (`photographs`, `colours`), what is asked about them (`queries`), how strips are drawn
(`strip`), and the dataset (`dataset`).
"""
