"""What importing the package does, and what it leaves alone. In processes of their own, which have imported nothing."""

import json
import subprocess
import sys

import pytest

import triton_convbn

BARE = """
import importlib.machinery, json, sys

asked = []


class WithoutTriton:
    # In the place of the finder of installed packages: torch looks for triton as well, and has to get a plain "no".
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "triton":
            asked.append(name)
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)


sys.meta_path = [WithoutTriton if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import torch

try:
    import triton
except ImportError:
    asked.clear()
else:
    raise AssertionError("triton is not blocked")


def probed(*arguments, **keywords):
    raise AssertionError("the GPU was probed")


for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties", "get_device_capability"):
    setattr(torch.cuda, name, probed)
before = set(sys.modules)

import triton_convbn

brought = sorted(set(sys.modules) - before)
w, b, mean = torch.randn(4, 3, 1, 1), torch.randn(4), torch.randn(4)
gamma, beta, var = torch.rand(4) + 0.5, torch.randn(4), torch.rand(4) + 0.5
x = torch.randn(2, 3, 5, 5)
folded = torch.nn.functional.conv2d(x, *triton_convbn.fold(w, b, gamma, beta, mean, var, 1e-3))
conv = torch.nn.functional.conv2d(x, w, b)
expected = torch.nn.functional.batch_norm(conv, mean, var, gamma, beta, eps=1e-3)
options = triton_convbn.Options.of(recompute=False).recompute
try:
    triton_convbn.Options.of(nothing=1)
except triton_convbn.OptionError as error:
    refused = str(error)
names = dir(triton_convbn)
print(json.dumps({
    "asked": asked,
    "brought": brought,
    "brought_later": sorted(set(sys.modules) - before - set(brought)),
    "error": (folded - expected).abs().max().item(),
    "options": options,
    "refused": refused,
    "names": names,
}))
"""

FULL = """
import inspect, json, types
import triton_convbn
from torch._inductor import config

values = {name: getattr(triton_convbn, name) for name in triton_convbn.__all__}
print(json.dumps({
    "names": sorted(triton_convbn.__all__),
    "callable": sorted(name for name, value in values.items() if callable(value)),
    "explain": [inspect.isfunction(values["explain"]), values["explain"].__name__],
    "same": all(getattr(triton_convbn, name) is value for name, value in values.items()),
    "patched": str(config.pre_grad_custom_pass),
}))
"""


def printed(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_triton_and_without_a_gpu() -> None:
    found = printed(BARE)
    assert "triton_convbn.options" in found["brought"]
    assert found["asked"] == []
    heavy = ("triton", "torchvision", "timm", "pandas", "matplotlib", "rich", "typer")
    for name in (*found["brought"], *found["brought_later"]):
        assert name.split(".")[0] not in heavy, name
        assert not name.startswith(("torch._inductor.compile_fx", "torch._inductor.codegen")), name
    assert found["error"] < 1e-5
    assert found["options"] is False
    assert "nothing" in found["refused"]
    assert "recompute" in found["refused"]
    assert {"patch", "explain", "fold"} <= set(found["names"])


@pytest.mark.slow
def test_every_name_resolves() -> None:
    found = printed(FULL)
    stable = {"patch", "unpatch", "patched", "ConvBNPass", "Options", "explain", "fold", "conv_bn_eval"}
    assert stable <= set(found["names"])
    assert found["callable"] == found["names"]
    # A submodule of that name would take the function's place as soon as anything imports it.
    assert found["explain"] == [True, "explain"]
    assert found["same"]
    assert found["patched"] == "None"  # offering the patch is not applying it


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'triton_convbn' has no attribute 'patched_'"):
        _ = triton_convbn.patched_
