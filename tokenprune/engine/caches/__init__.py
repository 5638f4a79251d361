"""KV caches of pruned prefills, whose layers hold different tokens, and the steps that continue them.

Belongs here: what stores, checks or continues a cache. Support for a further kind of transformers' cache layers begins
in `cache_layers`.
"""
