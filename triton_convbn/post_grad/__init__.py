"""The passes after autograd, run by one manager."""
