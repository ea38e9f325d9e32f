"""The pass before autograd: find the pairs of a graph, choose those that gain, rewrite them."""
