"""Triton kernels of the fold and how they are generated, compiled and launched; knows nothing of torch.fx."""
