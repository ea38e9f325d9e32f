"""Test the cases of the benchmark: layers of networks, and whole models."""

import sys

import pytest
import torch
from bench_kit import bench
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from triton_convbn.perf import workloads
from triton_convbn.perf.workloads import Case

from triton_convbn.errors import UsageError


def shapes_of(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Return the convolutions of a network and the shapes of their inputs."""
    found = set()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.add((repr(module), tuple(inputs[0].shape[1:])))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(hook)
    model(torch.randn(1, 3, 224, 224))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("resnet50", 23), ("mobilenet_v2", 30)])
def test_layers_of_a_network(name: str, count: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    found = workloads.LAYERS[name]()
    blocks = [each.build() for each in found]
    assert len(found) == count == len({each.name for each in found})
    assert {(repr(block[0]), each.shape) for each, block in zip(found, blocks, strict=True)} == shapes_of(
        getattr(torchvision.models, name)().eval()
    )
    convolutions = {
        path for path, module in torchvision.models.get_model(name).named_modules() if isinstance(module, nn.Conv2d)
    }
    assert {each.name.removeprefix(f"{name}/") for each in found} <= convolutions
    for each, block in zip(found, blocks, strict=True):
        assert [type(module) for module in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert_works(each)


def test_layers_of_one_shape_are_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case has the name of the first. A convolution without a BatchNorm is no case."""

    def block() -> list[nn.Module]:
        return [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()]

    model = nn.Sequential(*block(), *block(), nn.MaxPool2d(2), *block(), nn.Conv2d(3, 3, 3)).eval()
    monkeypatch.setattr(workloads, "load", lambda _name: model)
    found = workloads.of_model("some", 16)
    assert [(each.name, each.shape) for each in found] == [("some/0", (3, 16, 16)), ("some/7", (3, 8, 8))]


def test_application(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"call": "torch.nn:Linear", "arguments": {"in_features": 3, "out_features": 4}, "shapes": ["2,3"]}
    monkeypatch.setitem(workloads.APPLICATIONS, "torch.linear", entry)
    monkeypatch.setitem(workloads.APPLICATIONS, "missing.model", {"call": "no_such_package:Model", "shapes": ["2,3"]})
    found = workloads.whole("torch.linear")
    assert found.x is not None
    assert found.build()(found.x).shape == (2, 4)
    with pytest.raises(UsageError, match="leave out --size"):
        workloads.whole("torch.linear", 32)
    with pytest.raises(UsageError, match="No module named 'no_such_package'; pip install"):
        workloads.whole("missing.model")


def test_rt_detr() -> None:
    """RT-DETR's encoder has sums of branches, and runs where transformers is installed."""
    pytest.importorskip("transformers")
    (case,) = workloads.LAYERS["rt_detr"]()
    assert_works(case)


def test_rt_detr_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="rt_detr need transformers"):
        workloads.LAYERS["rt_detr"]()


def assert_works(each: Case) -> None:
    """Check that `build` returns a new model in eval mode, with random statistics, that runs on the shape."""
    assert each.inner
    model, again = each.build(), each.build()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    assert not any(module.training for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    for norm in norms:
        assert not torch.allclose(norm.running_mean, torch.zeros(()), atol=0.1)
        assert not torch.allclose(norm.running_var, torch.ones(()), atol=0.1)
        assert not torch.allclose(norm.weight, torch.ones(()), atol=0.1)
        assert not torch.allclose(norm.bias, torch.zeros(()), atol=0.1)
    with torch.no_grad():
        output = model(torch.randn(2, *each.shape))
    assert isinstance(output, Tensor)
    assert len(output) == 2
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("name", "found"),
    [("resnext", ["block_32x4d"]), ("decoder", ["three_transposed"]), ("heads", ["simclr", "byol"])],
)
def test_other_layers(name: str, found: list[str]) -> None:
    made = workloads.LAYERS[name]()
    assert [each.name for each in made] == [f"{name}/{piece}" for piece in found]
    for each in made:
        assert_works(each)


def test_unknown_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--layers", "vgg") == 2
    assert "no such layers: vgg; choose from resnet50, mobilenet_v2, activations" in capsys.readouterr().err


def test_whole_model_at_another_size_is_another_case() -> None:
    """Otherwise a later run would take its figures for those of the model at its own size."""
    pytest.importorskip("torchvision")
    found = workloads.whole("resnet18"), workloads.whole("resnet18", 64)
    assert [(each.name, each.shape, each.inner) for each in found] == [
        ("resnet18", (3, 224, 224), False),
        ("resnet18@64", (3, 64, 64), False),
    ]
    assert workloads.whole("resnet18", 224).name == "resnet18"
    with pytest.raises(UsageError, match="resnet81"):
        workloads.whole("resnet81")
