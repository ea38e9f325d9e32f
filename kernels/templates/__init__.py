"""Device code that is copied into generated kernels."""
