"""What pruning is: strategies, stages, decisions, tokens, budgets, the scheduler. Tensors and plain data, no model.

Goes here: everything that determines which tokens a strategy keeps in which layer, and what that costs. Modules here
use neither `nn.Module` nor transformers, and are tested without a model. `engine/` applies the decisions to a decoder.
`budget` is the budget solver. What a strategy's author imports is at the top; a new step of a prefill goes into
`scheduling/`.
"""
