"""The tuner: find the configuration of the fold kernels that suits a GPU.

problem   one call of a fold, and the calls of a model
space     the configurations of a problem
search    the order in which they are tried
offline   compile for a GPU that need not be there; device: measure on one (both are an `outcome.Evaluator`)
store     a file with the outcome of every candidate
run       problems, search, evaluator and store together
report    tables, CSV, and the entries of the tuned file
cli       `triton-convbn tune`
"""
