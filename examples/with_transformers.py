"""Fine-tune with transformers' Trainer, which calls `model.train()` at every step and compiles with Inductor.

A residual network for scikit-learn's digits learns mirror images. Needs `pip install '.[frameworks]'`.
"""

import torch.nn.functional as F
import typer
from digits import data, pretrained
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import triton_convbn


class WithLoss(nn.Module):
    """Return the loss with the scores, as the Trainer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.model(images)
        return {"loss": F.cross_entropy(scores, labels), "scores": scores}


def main(steps: int = 20, pretrain_steps: int = 80, compiled: bool = True) -> None:
    """Print the first and the last loss, and how many BatchNorms are folded."""
    model = triton_convbn.freeze_statistics(WithLoss(pretrained(0, pretrain_steps)))
    triton_convbn.patch()  # torch_compile_backend="triton_convbn" is refused: accelerate has a list of names
    arguments = TrainingArguments(
        "out/with_transformers", max_steps=steps, torch_compile=compiled, per_device_train_batch_size=64, optim="sgd",
        learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    x, y, _, _ = data()
    images = [{"images": image, "labels": label} for image, label in zip(x.flip(-1), y, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=images)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"{counters['triton_convbn']['folded']} BatchNorms folded")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    typer.run(main)
