"""The fold as functions and operators: plain torch, autograd functions, ``torch.library``."""
