"""Benchmarks and the tables made from them."""
