"""Options: their names and values in every place that takes them."""

import inspect

import pytest
import torch
from checking import scramble
from torch import nn

from triton_convbn import ConvBNPass, OptionError, Options, patch, patched, unpatch
from triton_convbn.options import names


def pair():
    return scramble(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval(), 1e-3), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("function", [patch, patched, ConvBNPass])
def test_options_are_spelled_out(function):
    """With the names and defaults of `Options`. `patch` compiles, so it has no `codegen`."""
    spelled = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    wanted = {name: getattr(Options(), name) for name in names()}
    assert spelled == (wanted if function is ConvBNPass else {k: v for k, v in wanted.items() if k != "codegen"})


def through_backend(**options):
    model, x = pair()
    torch.compile(model, backend="triton_convbn_eager", options=options)(x)


def through_patched(**options):
    with patched(**options) as installed:
        return installed.options


def through_patch(**options):
    try:
        return patch(**options).options
    finally:
        unpatch()


TAKERS = {
    "pass": lambda **options: ConvBNPass(**options).options,
    "patch": through_patch,
    "patched": through_patched,
    "backend": through_backend,
}


FUNCTIONS = {name: taker for name, taker in TAKERS.items() if name != "backend"}


@pytest.mark.parametrize("taker", FUNCTIONS)
def test_right_options(taker):
    assert FUNCTIONS[taker](pairs_per_launch=3, when="always") == Options(pairs_per_launch=3, when="always")


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("options", [{"pairs_per_launch": 0}, {"pairs_per_launch": 65}, {"when": "never"}])
def test_wrong_values(taker, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        TAKERS[taker](**options)


@pytest.mark.parametrize("taker", FUNCTIONS)
def test_an_unknown_keyword(taker):
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        FUNCTIONS[taker](no_such=1)


@pytest.mark.parametrize("backend", ["triton_convbn", "triton_convbn_eager"])
def test_an_unknown_option_of_a_backend(backend):
    model, x = pair()
    with pytest.raises(OptionError, match="unknown option no_such; the options are kernel, recompute, "):
        torch.compile(model, backend=backend, options={"no_such": 1})(x)


@pytest.mark.parametrize("name", ["triton_convbn", "triton_convbn_eager"])
def test_a_backend_refuses_codegen_of_the_other(name):
    model, x = pair()
    other = {"triton_convbn": "triton_convbn_eager", "triton_convbn_eager": "triton_convbn"}[name]
    with pytest.raises(OptionError, match=f"use backend='{other}' for codegen={name == 'triton_convbn_eager'}"):
        torch.compile(model, backend=name, options={"codegen": name == "triton_convbn_eager"})(x)
