"""What the conformance kits are made of: cases, synthetic inputs, checks, and how a result is reported.

Goes here: what a kit needs and a plugin author does not import. A new check of strategies goes into `invariants` (what
must hold of every run) or `recording` (what is watched while one runs); a new kind of decoder into `decoder_families`.
"""
