"""Fine-tune in a loop of accelerate's. The model is compiled before `prepare`, with any backend.

A residual network for scikit-learn's digits learns mirror images. Needs `pip install '.[frameworks]'`. On several
GPUs: `accelerate launch examples/with_accelerate.py`.
"""

from itertools import cycle, islice

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from digits import data, pretrained
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

import triton_convbn


def main(steps: int = 20, pretrain_steps: int = 80, backend: str = "triton_convbn") -> None:
    """Print the first and the last loss, and how many BatchNorms are folded."""
    accelerator = Accelerator()
    model = triton_convbn.freeze_statistics(pretrained(0, pretrain_steps)).train()
    model.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.003, momentum=0.9)
    x, y, _, _ = data()
    loader = DataLoader(TensorDataset(x.flip(-1), y), batch_size=64, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for images, labels in islice(cycle(loader), steps):
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"{counters['triton_convbn']['folded']} BatchNorms folded")
    accelerator.print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    typer.run(main)
