"""Referring segmentation in REFER's layout: refcoco, refcoco+, refcocog, refclef and grefcoco.

Goes here: finding the files (`layout`), reading lists of references without running what a pickle names (`unpickler`),
joining them with the instances (`joined`), and the datasets.
"""
