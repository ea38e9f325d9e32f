"""The passes after autograd run on every graph that holds folds, and what the joint graph's passes do to folds."""

import re
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checking import check, counted, scramble
from torch import nn
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from triton_convbn import ConvBNPass, patched


def model_and_input():
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.SiLU(), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7)]
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    return scramble(nn.Sequential(*layers).eval(), 1e-3), x


def generated(compile_model, in_thread):
    """The code of forward and backward, without names of files. Backward is compiled when it first runs."""
    torch._dynamo.reset()
    model, x = model_and_input()
    codes = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        config.patch(force_disable_caches=True),
    ):
        loss = compile_model(model)(x).sin().sum()
        if in_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
    return [re.sub(r"(?m)^.*(/tmp/|AOT ID|kernel\.cpp|async_compile|Topologically).*$", "", code) for code in codes]


def by_patch(model):
    compiled = torch.compile(model)

    def run(x):
        with patched():
            return compiled(x)

    return run


WAYS = {
    "backend": lambda model: torch.compile(model, backend="triton_convbn"),
    "patched": by_patch,
    "option": lambda model: torch.compile(model, options={"pre_grad_custom_pass": ConvBNPass()}),
}


@pytest.mark.slow
def test_a_backward_that_another_thread_compiles():
    """Autograd compiles a CUDA backward in a thread of its own, which has Inductor's default configuration."""
    want, *others = (generated(way, in_thread) for way in WAYS.values() for in_thread in (False, True))
    assert len(want) == 2
    for other in others:
        assert other == want


class Spelled(nn.Module):
    """A pair whose BatchNorm has some of its vectors as constants of the graph."""

    def __init__(self, eps, **constants):
        super().__init__()
        self.m = scramble(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval(), 1e-3)
        self.eps, self.constants = eps, constants

    def forward(self, x):
        bn = self.m[1]
        vectors = {"running_mean": bn.running_mean, "running_var": bn.running_var, "weight": bn.weight, "bias": bn.bias}
        vectors |= {name: make(5, dtype=x.dtype) for name, make in self.constants.items()}
        return F.batch_norm(self.m[0](x), **vectors, training=False, eps=self.eps)


CONSTANTS = {
    "none": {},
    "mean": {"running_mean": torch.zeros},
    "bias": {"bias": torch.zeros},
    "weight": {"weight": torch.ones},
    "variance": {"running_var": torch.ones},
    "all but weight": {"running_mean": torch.zeros, "running_var": torch.ones, "bias": torch.zeros},
    "all": {"running_mean": torch.zeros, "running_var": torch.ones, "bias": torch.zeros, "weight": torch.ones},
}


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("name", CONSTANTS)
def test_operations_that_do_nothing(name, eps):
    """Inductor replaces ``var + 0`` by ``var`` and marks it as recomputed: "Node mul_4 was invalid, but is output"."""
    if eps == 0.0 and torch.__version__.startswith("2.11"):
        pytest.skip("batch_norm of torch 2.11 refuses an eps of 0")
    model = Spelled(eps, **CONSTANTS[name])
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    check(torch.compile(model, backend="triton_convbn", options={"when": "always"}), model, x)
    assert counted()[0] == 1
