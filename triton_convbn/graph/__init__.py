"""The pass before autograd: find the pairs of a graph, select the profitable ones, rewrite them."""
