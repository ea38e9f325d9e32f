"""FrozenBatchNorm as people write it: modules of four buffers, weight, bias, running_mean and running_var."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Frozen(nn.Module):
    """Buffers of frozen statistics and affine, applied by `call(self, x)`. rank: of x."""

    def __init__(self, channels: int, call: Callable[[Any, Tensor], Tensor], eps: float = 1e-5, rank: int = 4) -> None:
        super().__init__()
        self.call, self.eps, self.shape = call, eps, (1, -1, *(1,) * (rank - 2))
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        return self.call(self, input)

    def trainable(self, *names: str) -> "Frozen":
        """The same with these vectors parameters."""
        for name in names:
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value))
        return self


def vectors_first(m: Any, x: Tensor) -> Tensor:
    """All vectors are reshaped, then computed with: torchvision's and timm's way."""
    weight, bias, mean, var = (v.reshape(m.shape) for v in (m.weight, m.bias, m.running_mean, m.running_var))
    scale = weight * (var + m.eps).rsqrt()
    return x * scale + (bias - mean * scale)


def casts_last(m: Any, x: Tensor) -> Tensor:
    """Computed in the vectors' dtype, then reshaped, then cast to that of x."""
    scale = m.weight * (m.running_var + m.eps).rsqrt()
    shift = (m.bias - m.running_mean * scale).reshape(m.shape)
    return x * scale.reshape(m.shape).to(x.dtype) + shift.to(x.dtype)


def detectron2(m: Any, x: Tensor) -> Tensor:
    """detectron2's way: a BatchNorm where x needs no gradient, arithmetic with casts where it does."""
    if x.requires_grad:
        return casts_last(m, x)
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, training=False, eps=m.eps)


def scale_of(m: Any) -> Tensor:
    return m.weight * torch.rsqrt(m.running_var + m.eps)


def applied(m: Any, x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.view(m.shape) + (m.bias - m.running_mean * scale).view(m.shape)


def up(m: Any, name: str) -> Tensor:
    return getattr(m, name).view(m.shape)  # type: ignore[no-any-return]


def centred(m: Any, x: Tensor) -> Tensor:
    """The input is centred first, as decompositions of `batch_norm` write it."""
    normalized = (x - up(m, "running_mean")) * (up(m, "running_var") + m.eps).rsqrt()
    return normalized * up(m, "weight") + up(m, "bias")


SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vectors first": vectors_first,
    "casts last": casts_last,
    "detectron2": detectron2,
    "orders": lambda m, x: (lambda s: (m.bias - s * m.running_mean).view(m.shape) + s.view(m.shape) * x)(
        (m.eps + m.running_var).rsqrt() * m.weight
    ),
    "div by sqrt": lambda m, x: applied(m, x, m.weight / torch.sqrt(m.running_var + m.eps)),
    "times 1 / sqrt": lambda m, x: applied(m, x, m.weight * (1 / (m.running_var + m.eps).sqrt())),
    "reciprocal": lambda m, x: applied(m, x, torch.reciprocal(torch.sqrt(m.running_var + m.eps)) * m.weight),
    "power": lambda m, x: applied(m, x, m.weight * (m.running_var + m.eps) ** -0.5),
    "div by power": lambda m, x: applied(m, x, m.weight / (m.running_var + m.eps) ** 0.5),
    "torch.pow": lambda m, x: applied(m, x, torch.pow(m.running_var + m.eps, -0.5).mul(m.weight)),
    "functions": lambda m, x: torch.add(
        torch.mul(x, torch.reshape(scale_of(m), m.shape)),
        torch.sub(m.bias, torch.mul(m.running_mean, scale_of(m))).reshape(m.shape),
    ),
    "methods": lambda m, x: (lambda s: x.mul(s.view(m.shape)).add(m.bias.sub(m.running_mean.mul(s)).view(m.shape)))(
        m.running_var.add(m.eps).rsqrt().mul(m.weight)
    ),
    "no eps": lambda m, x: applied(m, x, m.weight * m.running_var.rsqrt()),
    "no weight": lambda m, x: applied(m, x, (m.running_var + m.eps).rsqrt()),
    "no bias": lambda m, x: (lambda s: x * s.view(m.shape) + (-(m.running_mean * s)).view(m.shape))(scale_of(m)),
    "trailing ones only": lambda m, x: (
        lambda s: x * s.view(m.shape[1:]) + (m.bias - m.running_mean * s).view(m.shape[1:])
    )(scale_of(m)),
    "unsqueezed": lambda m, x: (lambda s, up: x * up(s) + up(m.bias - m.running_mean * s))(
        scale_of(m), lambda vector: vector.unsqueeze(-1).unsqueeze(2).unsqueeze(0)
    ),
    "indexed": lambda m, x: (lambda s: x * s[None, :, None, None] + (m.bias - m.running_mean * s)[..., None, None])(
        scale_of(m)
    ),
    "vectors indexed": lambda m, x: (
        lambda w, b, mean, var: x * (w * (var + m.eps).rsqrt()) + (b - mean * (w * (var + m.eps).rsqrt()))
    )(*(v[:, None][..., None] for v in (m.weight, m.bias, m.running_mean, m.running_var))),
    "computed in float": lambda m, x: (
        lambda s: x * s.to(x).view(m.shape) + (m.bias.float() - m.running_mean.float() * s).to(x).view(m.shape)
    )(m.weight.float() * (m.running_var.float() + m.eps).rsqrt()),
    "centred": centred,
    "centred, by one scale": lambda m, x: (x - up(m, "running_mean")) * scale_of(m).view(m.shape) + up(m, "bias"),
    "centred, div": lambda m, x: (
        up(m, "bias") + up(m, "weight") * ((x - up(m, "running_mean")) / torch.sqrt(up(m, "running_var") + m.eps))
    ),
    "centred, weight first": lambda m, x: (
        up(m, "weight") * (x - up(m, "running_mean")) / (m.running_var + m.eps).view(m.shape) ** 0.5 + up(m, "bias")
    ),
    "centred, no bias": lambda m, x: (
        (x - up(m, "running_mean")) * (m.eps + up(m, "running_var")).rsqrt() * up(m, "weight")
    ),
    "centred, no weight": lambda m, x: (
        (x - up(m, "running_mean")) / (up(m, "running_var") + m.eps).sqrt() + up(m, "bias")
    ),
}
