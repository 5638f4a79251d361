"""When what happens in a prefill: the plan of stages, the walk over the layers, and the state of every image token.

Goes here: what stands between a strategy and the engine. Whether a model suffices for a strategy (`requirements`), the
plan for a shape (`schedule`), who carries it out (`scheduler`), what a decision does to the tokens (`state`) and which
decisions are refused (`validation`).
"""
