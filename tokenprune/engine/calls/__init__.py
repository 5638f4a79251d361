"""How models are called: intercepting calls, `torch.compile`, wrappers, `generate`, and whose turn it is.

Goes here: what PyTorch and transformers do around a forward, so that the rest of the engine sees a plain decoder that
one thread calls at a time.
"""
