"""Inputs of models: tensors of given shapes, and models as functions of one tensor."""

import copy
from typing import Any

import models_with_inputs
import pytest
import torch
from torch import Tensor, nn

from triton_convbn.errors import UsageError
from triton_convbn.example_inputs import Inputs, bind, check, of_shapes, tensors_of
from triton_convbn.models import load_with_inputs


def test_shapes() -> None:
    inputs = of_shapes(["2,1,4", "3:int64", "1:bool", "2,2:float64"])
    assert [tuple(tensor.shape) for tensor in inputs.args] == [(2, 1, 4), (3,), (1,), (2, 2)]
    assert [tensor.dtype for tensor in inputs.args] == [torch.float32, torch.int64, torch.bool, torch.float64]
    assert inputs.kwargs == {}
    assert inputs.batch == 2
    assert set(of_shapes(["99:int64"]).args[0].tolist()) == {0, 1}
    torch.testing.assert_close(of_shapes(["2,3"]).args, of_shapes(["2,3"]).args)


@pytest.mark.parametrize("shape", ["", "1,", "1,x", "1,-2", "1.5", "2:int65", "2:nn", ":int64"])
def test_a_shape_that_is_none(shape: str) -> None:
    with pytest.raises(UsageError, match="as in 1,3,224,224 or 2,9:int64"):
        of_shapes([shape])


def test_load_with_inputs() -> None:
    name = "models_with_inputs:returns_dict"
    _, own = load_with_inputs(name)
    assert [tuple(tensor.shape) for tensor in own.tensors] == [(2, 3, 8, 8), (2, 3), (4,)]
    assert own.kwargs["flip"] is True
    _, given = load_with_inputs(name, ["1,3,9,9", "1,2:int64"])
    assert [tuple(tensor.shape) for tensor in given.tensors] == [(1, 3, 9, 9), (1, 2)]
    wrong: dict[str, dict[str, int]] = {
        "--batch": {"batch": 2},
        "--size": {"size": 8},
        "--batch and --size": {"batch": 2, "size": 8},
    }
    for given_too, values in wrong.items():
        with pytest.raises(UsageError, match=f"returns_dict gives the inputs: leave out {given_too}$"):
            load_with_inputs(name, **values)
    _, images = load_with_inputs("models_with_inputs:mixed", batch=2, size=9)
    assert images.images
    assert images.args[0].shape == (2, 3, 9, 9)


def test_a_model_of_one_input_is_bound_as_it_is() -> None:
    model, x = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 2, 2)
    assert bind(model, Inputs((x,))) == (model, x)
    with pytest.raises(UsageError, match="no input of the model is a tensor"):
        bind(model, Inputs((3,)))


class Both(nn.Module):
    def forward(self, images: dict[str, Tensor], index: Tensor, again: Tensor, *, shift: Any) -> Tensor:
        return (images["a"] * again + shift["by"][0])[index] * shift["times"]


def test_bound_inputs_move_and_copy_with_the_model() -> None:
    index, x, by = torch.tensor([1]), torch.randn(2, 3), torch.randn(3)
    inputs = Inputs(({"a": x}, index, x), {"shift": {"by": [by], "times": 2}})
    model, first = bind(Both().eval(), inputs)
    assert first is x
    assert not model.training
    y = torch.randn(2, 3)
    want = (y * y + by)[index] * 2
    torch.testing.assert_close(model(y), want)
    double = copy.deepcopy(model).double()(y.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), want)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(y), want)


@pytest.mark.parametrize("name", ["dict", "list", "nested", "dataclass", "output"])
def test_tensors_of_outputs(name: str) -> None:
    """The floating-point ones. A tensor that a dataclass and the mapping that it is both hold counts once."""
    y = torch.randn(2, 4)
    found = tensors_of(models_with_inputs.RETURNS[name](y))
    want = {"list": [y, y.mean()], "nested": [y, y * 2, y.mean()], "output": [y.mean(), y]}
    torch.testing.assert_close(found, want.get(name, [y]))


def test_an_error_of_the_model_is_one_line() -> None:
    model, inputs = nn.Linear(5, 5), of_shapes(["2,3", "1:int64"])
    with pytest.raises(UsageError) as raised:
        check("mine", model, inputs)
    message = str(raised.value)
    assert message.startswith("mine does not run on inputs of shapes (2, 3), (1,): TypeError: ")
    assert "--shape" in message
    assert "\n" not in message
