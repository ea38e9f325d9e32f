"""Fine-tune a network of branches with frozen statistics, every block one convolution, and deploy it as that.

A block as in MobileOne adds up five convolutions and a BatchNorm that read one input. Its authors merge them once,
after training. Here they are merged on every call while the network trains, and `fold_exported` merges them for good.
The network learns scikit-learn's digits first, then mirror images. Needs `pip install '.[examples]'`.
"""

import copy
import time

import torch
import torch.nn.functional as F
import typer
from digits import accuracy, data, train
from torch import Tensor, nn
from torch._dynamo.utils import counters

import triton_convbn
from triton_convbn.measure import saved_for_backward


def conv_bn(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Four 3 x 3 convolutions, a 1 x 1 convolution and a BatchNorm, added up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = (3, 3, 3, 3, 1)
        self.branches = nn.ModuleList([conv_bn(channels, channels, size) for size in sizes])
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum(branch(x) for branch in self.branches) + self.bn(x))


class Net(nn.Module):
    """Map images (N, 1, 8, 8) to the scores of ten digits, (N, 10)."""

    def __init__(self, channels: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.first = conv_bn(1, channels, 3)
        self.blocks, self.fc = nn.Sequential(*(Block(channels) for _ in range(blocks))), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.first(x))).mean((2, 3)))


def main(pretrain_steps: int = 60, steps: int = 60) -> None:
    x, y, test_x, test_y = data()
    torch.manual_seed(0)
    start = Net()
    train(start, start, x, y, pretrain_steps, lr=0.05)
    start.eval()  # the statistics are frozen, every parameter trains
    losses = {}
    for name in ("eager", "triton_convbn_eager"):
        model = copy.deepcopy(start)
        run = model if name == "eager" else torch.compile(model, backend=name)
        run(x[:64])
        torch.manual_seed(0)
        before = time.perf_counter()
        losses[name] = train(model, run, x.flip(-1), y, steps, lr=0.003)
        milliseconds = (time.perf_counter() - before) / steps * 1e3
        merged, folded = counters["triton_convbn"]["merged"], counters["triton_convbn"]["folded"]
        with saved_for_backward(model) as saved:
            run(x[:64])
        score = accuracy(model, test_x.flip(-1), test_y)
        print(f"{name:20} {score:.1%}, {milliseconds:.0f} ms a step, {saved.total / 1e6:.2f} MB kept for backward")
    print(f"{merged} blocks merged, {folded} BatchNorms folded")
    apart = max(abs(one - other) for one, other in zip(*losses.values(), strict=True))
    print(f"the losses are {apart:.1e} apart at most")

    deployed = triton_convbn.fold_exported(torch.export.export(model.eval(), (test_x,)))
    targets = [str(node.target) for node in deployed.graph.nodes]
    convolutions, norms = (sum(name in target for target in targets) for name in ("conv2d", "batch_norm"))
    print(f"{convolutions} convolutions and {norms} BatchNorms deployed")
    with torch.no_grad():
        expected, found = model(test_x), deployed.module()(test_x)
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"the deployed scores differ by {difference:.1e} of the largest")


if __name__ == "__main__":
    typer.run(main)
