"""Fine-tune with Lightning, whose `Trainer.fit` trains a compiled module like any other.

A residual network for scikit-learn's digits learns mirror images. Needs `pip install '.[frameworks]'`.
"""

import lightning
import torch
import torch.nn.functional as F
import typer
from digits import data, pretrained
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

import triton_convbn


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.003, momentum=0.9)


def main(steps: int = 20, pretrain_steps: int = 80, backend: str = "triton_convbn") -> None:
    """Print the first and the last loss, and how many BatchNorms are folded."""
    module = triton_convbn.freeze_statistics(Classifier(pretrained(0, pretrain_steps)))
    module.train()  # the network comes in eval mode, which Lightning would keep
    module.model.compile(backend=backend)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    x, y, _, _ = data()
    trainer.fit(module, DataLoader(TensorDataset(x.flip(-1), y), batch_size=64, shuffle=True))
    print(f"{counters['triton_convbn']['folded']} BatchNorms folded")
    print(f"loss {module.losses[0]:.3f} at first, {module.losses[-1]:.3f} at last")


if __name__ == "__main__":
    typer.run(main)
