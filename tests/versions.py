"""Which torch and Triton run the tests, for behaviour that is theirs and not ours."""

from importlib.metadata import version

import pytest


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


TORCH, TRITON = _release("torch"), _release("triton")


def needs_torch(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip with `reason` under an older torch, because that behaves differently and no change of ours would help."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"torch before {major}.{minor}: {reason}")


EPS = [1e-3, 1e-5, pytest.param(0.0, marks=needs_torch(2, 12, "batch_norm refuses an eps of 0"))]
