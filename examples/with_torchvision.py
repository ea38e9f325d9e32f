"""Fine-tune as torchvision's reference training does, which calls `model.train()` in every epoch.

The loop has the parts of its references/classification/train.py: weight decay without that of norms, a schedule, a
moving average of the weights, and a validation after each epoch. Two lines are new. A ResNet learns mirror images of
scikit-learn's digits. Needs `pip install '.[examples]'`.
"""

import torch
import typer
from digits import data, train
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

import triton_convbn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the parameters of norms, which do not decay, and all others."""
    norms = [p for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def train_one_epoch(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, average: AveragedModel
) -> list[float]:
    """Return the loss of each step."""
    model.train()  # the BatchNorms stay in eval mode
    losses = []
    for image, target in loader:
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def images(x: Tensor) -> Tensor:
    """Return the digits as colour images of 32 x 32 pixels."""
    return nn.functional.interpolate(x, scale_factor=4).expand(-1, 3, -1, -1).contiguous()


def main(epochs: int = 2, pretrain_steps: int = 40, backend: str = "triton_convbn") -> None:
    """Print the first and the last loss, the accuracies, and how many BatchNorms are folded."""
    torch.manual_seed(0)
    x, y, x_val, y_val = data()
    loader = DataLoader(TensorDataset(images(x.flip(-1)), y), batch_size=64, shuffle=True, drop_last=True)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    train(model.train(), model, images(x), y, pretrain_steps, 0.02)  # in place of pretrained weights
    # Behind torch.nn.SyncBatchNorm.convert_sync_batchnorm, before DistributedDataParallel:
    triton_convbn.freeze_statistics(model)
    model.compile(backend=backend)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), 0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    losses: list[float] = []
    for epoch in range(epochs):
        losses += train_one_epoch(model, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer, loader, average)
        schedule.step()
        if epoch == 0:
            print(f"{counters['triton_convbn']['folded']} BatchNorms folded")
        scores = [evaluate(each, images(x_val.flip(-1)), y_val) for each in (model, average)]
        print(f"epoch {epoch}: {scores[0]:.0%} of the test set, {scores[1]:.0%} with the averaged weights")
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    typer.run(main)
