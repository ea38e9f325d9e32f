"""Options: their names, old and new, in every place that takes them."""

import inspect
import warnings

import pytest
import torch
from checking import counted, scramble
from torch import nn

import triton_convbn
from triton_convbn import ConvBNPass, OptionError, Options, conv_bn_eval, patch, patched, unpatch
from triton_convbn.options import names


def pair():
    return scramble(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval(), 1e-3), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("function", [patch, patched, ConvBNPass])
def test_options_are_spelled_out(function):
    """With the names and defaults of `Options`. `patch` compiles, so it has no `codegen`."""
    spelled = {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "others"}
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


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"group": 3}, {"pairs_per_launch": 3}, "'group' is now 'pairs_per_launch'"),
        ({"when": "pays"}, {"when": "profitable"}, "when='pays' is now when='profitable'"),
    ],
)
def test_old_names_work_and_warn(taker, old, new, said):
    with pytest.warns(DeprecationWarning, match=said) as caught:
        options = TAKERS[taker](**old)
    assert options in (None, Options(**new))
    if taker != "backend":  # there Dynamo calls
        assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("taker", TAKERS)
def test_new_names_do_not_warn(taker):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        TAKERS[taker](pairs_per_launch=2, when="always")


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("options", [{"no_such": 1}, {"pairs_per_launch": 0}, {"group": 65}, {"when": "never"}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_options(taker, options):
    with pytest.raises(OptionError, match=r"no_such|pairs_per_launch|when"):
        TAKERS[taker](**options)


def test_codegen_as_an_option_of_the_backend_is_deprecated():
    model, x = pair()
    compiled = torch.compile(model, backend="triton_convbn", options={"codegen": False})
    with pytest.warns(DeprecationWarning, match="triton_convbn_eager"):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counted() == (1, {})


def test_the_old_order_of_conv_bn_eval():
    (conv, bn), x = pair()
    with pytest.warns(DeprecationWarning, match=r"now conv_bn_eval\(conv, bn, x\)") as caught:
        old = conv_bn_eval(bn, conv, x)
    assert [each.filename for each in caught] == [__file__]
    torch.testing.assert_close(old, triton_convbn.conv_bn_eval(conv, bn, x), rtol=0, atol=0)
