"""The fold as functions and as operators: plain torch, autograd functions, ``torch.library``."""
