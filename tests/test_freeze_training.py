"""`freeze_statistics` in training: DDP and FSDP2 on two gloo ranks, and transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import errors, scramble
from ranks import run_on_two_ranks
from test_freeze import AFFINE, Net, net
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from triton_convbn import freeze_statistics, unfreeze_statistics
from triton_convbn.inductor import eager_backend

pytestmark = pytest.mark.slow


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).square().sum() / len(y)


def double() -> Net:
    torch.manual_seed(0)
    model = net().double()
    model.head[2] = nn.Identity()
    return model


def train() -> None:
    """Train with DDP and FSDP2. Every parameter gets the gradient of one process, and none is reported as unused."""
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = freeze_statistics(double()).train()
    loss(whole(batch)).backward()
    want = {name: p.grad for name, p in whole.named_parameters()}
    for affine in (False, True):
        model = DistributedDataParallel(freeze_statistics(double(), affine=affine))
        compiled = torch.compile(model, backend="triton_convbn_eager")
        for _ in range(2):  # the second forward raises if the first backward has missed a parameter
            model.train().zero_grad()
            loss(compiled(batch.chunk(2)[dist.get_rank()])).backward()
        assert model.module.norms == (False, False)
        found = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
        assert {name for name in want if name not in found} == (AFFINE if affine else set())
        assert max(errors(found, {name: want[name] for name in found}).values()) < 1e-12
        torch._dynamo.reset()
    assert counters["triton_convbn"]["folded"] == 4
    model = DistributedDataParallel(double())
    freeze_statistics(model, affine=True)  # too late: DDP waits for their gradients
    loss(model(batch)).backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        model(batch)
    model = freeze_statistics(double())
    for part in (model.stem[1], model.stem, model.head, model):
        fully_shard(part)
    loss(model.train()(batch.chunk(2)[dist.get_rank()])).backward()
    assert model.norms == (False, False)
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert max(errors(found, want).values()) < 1e-12
    assert unfreeze_statistics(model).train().norms == (True, True)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path: Path) -> None:
    run_on_two_ranks(train, tmp_path)


def test_trainer_of_transformers(tmp_path: Path) -> None:
    """The Trainer calls `train` at every step. All BatchNorms fold in each, and the losses are those of eager mode."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 2} for index in range(8)]
    runs = 0

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        run = eager_backend(gm, inputs)

        def counted(*arguments: Any) -> Any:
            nonlocal runs
            runs += 1
            return run(*arguments)

        return counted

    losses = []
    for compiled in (False, True):
        transformers.set_seed(0)
        model = freeze_statistics(scramble(transformers.ResNetForImageClassification(config), 1e-5))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        means = [bn.running_mean.clone() for bn in norms]
        if compiled:
            model.compile(backend=backend)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.01, optim="sgd",
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert model.training
        assert all(map(torch.equal, means, (bn.running_mean for bn in norms)))
    assert runs == 4
    assert counters["triton_convbn"]["folded"] == len(norms) == 6
    assert not [name for name in counters["triton_convbn"] if name.startswith("declined")]
    assert len(losses[0]) == 4
    assert losses[0][0] != losses[0][-1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
