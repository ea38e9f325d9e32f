"""Device code that `codegen` copies into the kernels it generates."""
