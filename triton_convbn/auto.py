"""``import triton_convbn.auto`` is `triton_convbn.patch()` with the default options."""

from .inductor import patch

patch()
