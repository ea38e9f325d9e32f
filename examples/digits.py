"""Fine-tune with frozen statistics: the losses and the accuracy of eager mode, with less memory kept for backward.

A small residual network learns scikit-learn's digits with BatchNorm in training mode. Then its statistics are frozen,
and each backend fine-tunes it on mirror images, from the same seeds. Needs `pip install '.[examples]'`.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from triton_convbn.measure import saved_for_backward

BACKENDS: dict[str, dict] = {
    "eager": {},
    "triton_convbn_eager": {"backend": "triton_convbn_eager"},
    "triton_convbn": {"backend": "triton_convbn"},
}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))), inplace=True)


class Net(nn.Module):
    """Map images (N, 1, 8, 8) to the scores of ten digits, (N, 10)."""

    def __init__(self, channels: int = 24, blocks: int = 2) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.blocks, self.fc = nn.Sequential(*(Block(channels) for _ in range(blocks))), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)), inplace=True)).mean((2, 3)))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images in [0, 1] and digits: 1,297 to train with and 500 to test with."""
    x, y = torch.tensor(load_digits().images).float()[:, None] / 16, torch.tensor(load_digits().target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[500:]], y[order[500:]], x[order[:500]], y[order[:500]]


def train(model: nn.Module, run: Callable[..., Tensor], x: Tensor, y: Tensor, steps: int, lr: float) -> list[float]:
    """Return the loss of each step, on random batches of 64. `run` is the model, or the model compiled."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), []
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        (loss := F.cross_entropy(run(x[batch]), y[batch])).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def pretrained(seed: int, steps: int) -> nn.Module:
    """Return a network trained on upright digits, in eval mode."""
    torch.manual_seed(seed)
    model = Net()
    train(model, model, *data()[:2], steps, lr=0.1)
    return model.eval()


def main(out: Path = Path("out"), seeds: int = 3, pretrain_steps: int = 80, steps: int = 60, codegen: bool = True):
    """Write the picture to OUT. Without --codegen, leave out Inductor, which needs a C++ compiler."""
    x, y, test_x, test_y = (each.flip(-1) if each.ndim == 4 else each for each in data())  # mirror images
    out.mkdir(parents=True, exist_ok=True)
    backends = {name: keywords for name, keywords in BACKENDS.items() if codegen or name != "triton_convbn"}
    losses, kept, scores = {}, {}, {name: [] for name in backends}
    for seed in range(seeds):
        start = pretrained(seed, pretrain_steps)
        print(f"seed {seed}: {accuracy(start, test_x, test_y):.1%} on mirror images before fine-tuning", flush=True)
        for name, keywords in backends.items():
            model = copy.deepcopy(start)  # in eval mode: the statistics are frozen, every parameter trains
            run = torch.compile(model, **keywords) if keywords else model
            torch.manual_seed(seed)
            losses[name] = train(model, run, x, y, steps, lr=0.003)
            with saved_for_backward(model) as saved:
                run(x[:64])
            kept[name] = saved.total / 1e6
            scores[name].append(accuracy(model, test_x, test_y))
            print(f"  {name:30} {scores[name][-1]:.1%}, {kept[name]:.2f} MB kept for backward", flush=True)
    noise = torch.tensor(scores["eager"]).std().item() if seeds > 1 else float("nan")
    for name in list(backends)[1:]:
        apart = max(abs(a - b) for a, b in zip(scores["eager"], scores[name], strict=True))
        print(f"{name}: {apart:.2%} from eager at most; eager's own deviation between seeds: {noise:.2%}")
    draw(losses, kept, out / "digits.png")
    print(out / "digits.png")


def draw(losses: dict[str, list[float]], kept: dict[str, float], path: Path) -> None:
    curves, bars = (figure := Figure(figsize=(9, 3.4), layout="constrained")).subplots(1, 2)
    for index, (name, values) in enumerate(losses.items()):
        curves.plot(values, label=name, linewidth=6 - 2 * index, alpha=0.4 + 0.3 * index)  # the curves coincide
    curves.set(xlabel="step", ylabel="loss", title="fine-tuning, last seed")
    curves.legend(fontsize=8)
    bars.bar(list(kept), list(kept.values()), color="#4477aa")
    bars.set(ylabel="MB", title="kept for backward, batch 64")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
