"""The tuner: find the configuration of the fold kernels that suits a GPU.

problem  calls of a fold, and their configurations
bench    evaluate candidates in worker processes
evaluate by compiling for a GPU that need not be there, or by timing on one
store    a file with the outcome of every candidate
run      the search, within its budgets
report   tables, CSV, JSON, and the entries of the tuned file
cli      `triton-convbn tune`
"""
