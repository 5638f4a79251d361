"""What happens at which layer of a prefill: the plan of stages, the walk over the layers, the state of the tokens.

Goes here: what connects a strategy to the engine: the check of a model against a strategy's reads (`requirements`), the
plan for a shape (`schedule`), the walk that carries it out (`scheduler`), the effect of a decision on the tokens
(`state`) and the checks of a decision (`validation`).
"""
