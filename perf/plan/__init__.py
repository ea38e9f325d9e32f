"""Plan what Inductor would launch on an H100, on a machine without one: `triton-convbn plan`."""

from enum import StrEnum
from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16"]


class Provider(StrEnum):
    """A way to compile a model: Inductor by itself, with its own fold (upstream's), or with this package."""

    INDUCTOR = "inductor"
    EFFICIENT_CONV_BN = "inductor_efficient_conv_bn"
    EFFICIENT_CONV_BN_COMBO = "inductor_efficient_conv_bn_combo"
    OURS = "triton_convbn"
    ALWAYS = "triton_convbn_always"
    KEEP = "triton_convbn_keep"
