"""Passes after autograd: `manager.PASSES` lists them in order."""
