"""What pruning is: strategies, stages, decisions, tokens, budgets, the scheduler. Tensors and plain data, no model.

Goes here: what has to be known to say which tokens a strategy keeps in which layer, and what that counts for. A module
here knows no `nn.Module` and nothing of transformers, so that all of it is tested without a model. How decisions are
carried out on a decoder is the business of `engine/`.
"""
