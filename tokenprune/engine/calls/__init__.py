"""How models are called: interception of methods, `torch.compile`, wrappers, `generate`, threads.

Belongs here: everything that PyTorch and transformers do around a forward, so that the rest of the engine works on a
plain decoder, called by one thread at a time.
"""
