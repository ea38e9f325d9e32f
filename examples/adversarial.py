"""Find adversarial examples: gradients of the input only, through a network whose parameters are all frozen.

Projected gradient descent (Madry et al., arXiv 1706.06083) on scikit-learn's digits, in eager mode and with the pass.
In eager mode a BatchNorm saves its input for this gradient too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import typer
from digits import accuracy, data, pretrained
from torch import Tensor

from triton_convbn.measure import saved_for_backward


def attack(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, radius: float, steps: int) -> Tensor:
    """Return images within `radius` of x in every pixel, on which the loss is larger. Shaped like x."""
    found = x
    for _ in range(steps):
        leaf = found.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        found = (found + radius / 4 * grad.sign()).clamp(x - radius, x + radius).clamp(0, 1)
    return found


def main(pretrain_steps: int = 80, radius: float = 0.12, steps: int = 10) -> None:
    model = pretrained(0, pretrain_steps).requires_grad_(False)
    _, _, x, y = data()
    print(f"on clean images: {accuracy(model, x, y):.1%}")
    compiled = torch.compile(model, backend="triton_convbn_eager")
    found = {}
    for name, run in (("eager", model), ("triton_convbn", compiled)):
        found[name] = attack(run, x, y, radius, steps)
        with saved_for_backward(model) as saved:
            run(x.clone().requires_grad_(True))
        print(f"{name:14} {accuracy(model, found[name], y):.1%} under attack, {saved.total / 1e6:.1f} MB kept")
    same = (found["eager"] - found["triton_convbn"]).abs() < 1e-4
    print(f"{same.float().mean():.2%} of the pixels are the same: the sign of a gradient near 0 is rounding")


if __name__ == "__main__":
    typer.run(main)
