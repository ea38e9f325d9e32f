"""Eval-mode BatchNorm folded into convolutions, on every call and differentiably."""
