"""The matrix that Inductor's own pass is tested on, with that pass silenced and its flag on.

Of its 112 cases a quarter is compiled, 4 of each kind. Every two factors meet in every way.

Other than there, the BatchNorms have random affine and statistics, and every gradient is compared, not one SGD step.
"""

import copy
import itertools

import pytest
import torch
from checking import TOLERANCES, dynamo, errors, results, scramble
from frozen import Frozen, detectron2, vectors_first
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import efficient_conv_bn_eval as upstream
from torch.fx.experimental.proxy_tensor import make_fx

from triton_convbn import ConvBNPass, patched
from triton_convbn.ops.library import fold_op

pytestmark = pytest.mark.slow

# The spatial size is one that leaves a pixel after four strided convolutions, or grows to few.
KINDS = {
    "linear": (nn.Linear, nn.BatchNorm1d, ()),
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, (35,)),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, (35, 33)),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, (33, 31, 32)),
    "transposed1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (3,)),
    "transposed2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (2, 1)),
    "transposed3d": (nn.ConvTranspose3d, nn.BatchNorm3d, (1, 1, 1)),
}


class Single(nn.Module):
    pairs = 1

    def __init__(self, make_conv, make_bn):
        super().__init__()
        self.conv, self.bn = make_conv(3, 8), make_bn(8)

    def forward(self, x):
        return self.bn(self.conv(x))


class Several(nn.Module):
    """A convolution called twice folds only where the BatchNorm follows; a BatchNorm called twice only at the first."""

    pairs = 3

    def __init__(self, make_conv, make_bn):
        super().__init__()
        self.conv1, self.bn1 = make_conv(3, 8), make_bn(8)
        self.conv2, self.bn2 = make_conv(8, 8), make_bn(8)
        self.conv3, self.bn3 = make_conv(8, 8), make_bn(8)

    def forward(self, x):
        x = self.bn1(self.conv1(input=x))
        x = self.bn2(input=self.conv2(self.conv2(x)))
        x = self.bn3(input=self.conv3(input=x))
        return self.bn3(x) + x


def quarter():
    """Return 28 of the 112 cases. The second condition is another one for every second kind."""
    every = itertools.product((Single, Several), (True, False), KINDS, (False, True), (False, True))
    numbers = {kind: number for number, kind in enumerate(KINDS)}
    return [
        (model, bias, kind, sync, decomposed)
        for model, bias, kind, sync, decomposed in every
        if (model is Several) ^ bias ^ decomposed and not bias ^ sync ^ numbers[kind] % 2
    ]


@pytest.mark.parametrize(("model", "bias", "kind", "sync", "decomposed"), quarter())
def test_matrix(model, bias, kind, sync, decomposed, monkeypatch):
    def forbidden(*_args, **_keywords):
        raise AssertionError("Inductor's own pass ran")

    for name in ("efficient_conv_bn_eval", "efficient_conv_bn_eval_decomposed"):
        monkeypatch.setattr(upstream, name, forbidden)
    conv, bn, spatial = KINDS[kind]
    options = {} if conv is nn.Linear else {"kernel_size": 3, "stride": 2}
    eager = model(lambda i, o: conv(i, o, bias=bias, **options), bn)
    if sync:
        eager = nn.SyncBatchNorm.convert_sync_batchnorm(eager)
    scramble(eager.eval())
    x = torch.randn(4, 3, *spatial)
    exact = results(double := copy.deepcopy(eager).double(), double, x.double())
    folded = make_fx(copy.deepcopy(eager), pre_dispatch=True)(x) if decomposed else copy.deepcopy(eager)
    with patched(), inductor_config.patch(efficient_conv_bn_eval_fx_passes=True):
        found = results(torch.compile(folded), folded, x)
    assert counters["inductor"]["efficient_conv_bn_eval"] == model.pairs
    if decomposed:  # the traced module names its parameters anew: bring the gradients into the order of the model's
        names = {id(p): n for n, p in folded.named_parameters()}
        assert len(names) == sum(1 for _ in eager.parameters())
        found = _renamed(found, eager, folded)
    for name, error in errors(found, exact).items():
        assert error < TOLERANCES[torch.float32] * 5, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("model", "bias", "kind", "sync"), list(itertools.product((Single, Several), (True, False), KINDS, (False, True)))
)
def test_matrix_interpreted(model, bias, kind, sync, monkeypatch):
    """Again with the generated kernels, through Dynamo and AOTAutograd, without Inductor's code generation."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    conv, bn, spatial = KINDS[kind]
    options = {} if conv is nn.Linear else {"kernel_size": 3, "stride": 2}
    eager = model(lambda i, o: conv(i, o, bias=bias, **options), bn)
    if sync:
        eager = nn.SyncBatchNorm.convert_sync_batchnorm(eager)
    scramble(eager.eval())
    x = torch.randn(4, 3, *(min(size, 31) for size in spatial))

    def backend(gm, inputs):
        ConvBNPass(kernel="triton", when="always")(gm.graph)
        assert sum(len(node.args[0]) for node in gm.graph.nodes if node.target is fold_op) == model.pairs
        gm.recompile()
        return aot_eager(gm, inputs)

    exact = results(double := copy.deepcopy(eager).double(), double, x.double())
    found = results(torch.compile(eager, backend=backend), eager, x)
    assert counters["triton_convbn"]["folded"] == model.pairs
    for name, error in errors(found, exact).items():
        assert error < TOLERANCES[torch.float32] * 5, f"{name}: {error:.2e}"


FORMS = {"vectors first": vectors_first, "detectron2": detectron2}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("model", "kind"), list(itertools.product((Single, Several), KINDS)))
def test_matrix_frozen(model, kind, form):
    """N10: the same models with frozen BatchNorms, which that pass does not know. Their affine trains here."""
    conv, _, spatial = KINDS[kind]
    options = {} if conv is nn.Linear else {"kernel_size": 3, "stride": 2}
    rank = 2 + len(spatial)
    eager = model(
        lambda i, o: conv(i, o, **options),
        lambda channels: Frozen(channels, FORMS[form], rank=rank).trainable("weight", "bias"),
    )
    scramble(eager.eval())
    x = torch.randn(4, 3, *(min(size, 31) for size in spatial))
    exact = results(double := copy.deepcopy(eager).double(), double, x.double())
    found = results(dynamo(eager), eager, x)
    assert counters["triton_convbn"]["folded"] == model.pairs
    for name, error in errors(found, exact).items():
        assert error < TOLERANCES[torch.float32] * 5, f"{name}: {error:.2e}"


def _renamed(found, eager, traced):
    """Gradients under the names of the model: the traced module holds copies of the parameters, equal in value."""
    values = dict(eager.named_parameters())
    renamed = {name: value for name, value in found.items() if name not in dict(traced.named_parameters())}
    for name, parameter in traced.named_parameters():
        (match,) = [n for n, p in values.items() if p.shape == parameter.shape and torch.equal(p, parameter)]
        renamed[match] = found[name]
    return renamed


def test_its_own_pass_is_back_afterwards():
    """Silenced is not removed: the flag means Inductor's own pass again once ours is unpatched."""
    model = scramble(Single(lambda i, o: nn.Conv2d(i, o, 3), nn.BatchNorm2d).eval())
    x = torch.randn(2, 3, 5, 5)
    with patched():
        pass
    with inductor_config.patch(efficient_conv_bn_eval_fx_passes=True):
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["efficient_conv_bn_eval"] == 1
    assert "triton_convbn" not in counters or not counters["triton_convbn"]["folded"]
