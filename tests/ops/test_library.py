"""The operators: opcheck, gradients of every order, and the interpreted kernels behind them."""

import itertools
import pickle
from functools import partial

import pytest
import torch
from checking import TOLERANCES, scramble
from torch import nn
from torch._dynamo.utils import counters
from triton_convbn.kernels.inputs import FoldInputs

import triton_convbn
from triton_convbn.ops import library, plan, reference
from triton_convbn.ops.packed_pairs import OPTIONAL, PackedPairs

KINDS = [("conv", 2, 1), ("conv", 1, 2), ("linear", 0, 1), ("transposed", 2, 1), ("transposed", 2, 2), ("conv", 3, 4)]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def pair(kind, n, groups, present=7, dtype=torch.float64, requires_grad=True, seed=0, out_dtype=None, last=False):
    generator = torch.Generator().manual_seed(seed)
    c_in, c_out = 4, 4
    shape = (c_in, c_out // groups) if kind == "transposed" else (c_out, c_in // groups)

    def make(*size):
        return torch.randn(*size, *([2] * n if size == shape else []), generator=generator, dtype=torch.float64).to(
            dtype
        )

    weight = make(*shape)
    if last:
        weight = weight.to(memory_format=torch.channels_last)
    optional = [make(c_out) if present >> bit & 1 else None for bit in range(3)]
    for tensor in (weight, *optional):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    mean, var = make(c_out), make(c_out).abs() + 0.1
    return FoldInputs(weight, *optional, mean, var, 1e-3, kind == "transposed", groups, out_dtype)


def group(**options):
    return [
        pair(*kind, present=present, seed=i, **options)
        for i, (kind, present) in enumerate(zip(KINDS, (7, 0, 5, 2, 3, 6), strict=True))
    ]


def leaves(pairs):
    return [t for p in pairs for t in p[:4] if t is not None]


def fold_all(pairs):
    return library.fold_op(*PackedPairs.pack(pairs))


def plain(pairs):
    return [
        t
        for p in pairs
        for t in reference.fold_reference(*p[:7], transposed=p.transposed, groups=p.groups, dtype=p.out_dtype)
    ]


MODES = pytest.mark.parametrize("kernel", [False, True], ids=["torch", "interpreted"])


@pytest.mark.slow
@MODES
def test_opcheck(kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for requires_grad, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        pairs = group(requires_grad=requires_grad, dtype=dtype)
        torch.library.opcheck(library.fold_op, tuple(PackedPairs.pack(pairs)))
    last = [
        pair("conv", 2, 1, dtype=torch.float32, last=True),
        pair("transposed", 2, 2, dtype=torch.float32, last=True),
    ]
    torch.library.opcheck(library.fold_op, tuple(PackedPairs.pack(last)))
    columns = PackedPairs.pack(group(requires_grad=False, dtype=torch.float32))
    grads = [torch.randn_like(t) for t in plain(group(requires_grad=False, dtype=torch.float32))]
    count = len(columns.weights)
    wanted = [1 | (columns.present[i] << 1) for i in range(count)]
    torch.library.opcheck(torch.ops.triton_convbn.fold_backward.default, (grads, [3] * count, wanted, [], *columns))


@pytest.mark.slow
@MODES
@pytest.mark.parametrize(("kind", "n", "groups"), KINDS)
@pytest.mark.parametrize("present", [0, 7, 5])
def test_gradients_of_every_order(kernel, kind, n, groups, present, monkeypatch):
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = pair(kind, n, groups, present)
    names = [name for name in ("weight", *OPTIONAL) if getattr(inputs, name) is not None]

    def f(*values):
        return tuple(fold_all([inputs._replace(**dict(zip(names, values, strict=True)))]))

    # In the interpreter by random projections: every element took 260 of the slow tests' 5,000 seconds of CPU.
    assert torch.autograd.gradcheck(f, leaves([inputs]), fast_mode=kernel)
    assert torch.autograd.gradgradcheck(f, leaves([inputs]), fast_mode=kernel)


def with_prescale(pairs):
    """Return pairs of which every other one has prescale, with scales of very different sizes."""
    found = []
    for index, each in enumerate(pairs):
        var = torch.logspace(-8, 4, len(each.running_var), dtype=each.running_var.dtype)
        found.append(each._replace(running_var=var, prescale=True) if index % 2 == 0 else each)
    return found


@pytest.mark.slow
@MODES
def test_opcheck_with_prescale(kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pairs = with_prescale(group(dtype=torch.float32, out_dtype=torch.float16))
    columns = PackedPairs.pack(pairs)
    torch.library.opcheck(library.fold_op, tuple(columns))
    outputs = [each.detach() for each in library.fold_op(*columns)]
    count = len(pairs)
    grads, powers = [torch.randn_like(each) for each in outputs[: 2 * count]], outputs[2 * count :]
    assert len(powers) == count // 2
    columns = columns._replace(
        weights=[t.detach() for t in columns.weights], vectors=[t.detach() for t in columns.vectors]
    )
    wanted = [1 | (mask << 1) for mask in columns.present]
    torch.library.opcheck(torch.ops.triton_convbn.fold_backward.default, (grads, [3] * count, wanted, powers, *columns))


@MODES
@pytest.mark.parametrize(("kind", "n", "groups"), [("conv", 2, 1), ("transposed", 2, 2)])
@pytest.mark.parametrize("present", [7])
def test_gradients_with_prescale(kernel, kind, n, groups, present, monkeypatch):
    """Gradients of first and second order. The powers of two are constants."""
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = pair(kind, n, groups, present)._replace(prescale=True)
    names = [name for name in ("weight", *OPTIONAL) if getattr(inputs, name) is not None]

    def f(*values):
        weight, bias, _ = fold_all([inputs._replace(**dict(zip(names, values, strict=True)))])
        return weight, bias

    # Interpreted kernels use random directions instead of single elements: 2 seconds instead of 30.
    assert torch.autograd.gradcheck(f, leaves([inputs]), fast_mode=kernel)
    assert torch.autograd.gradgradcheck(f, leaves([inputs]), fast_mode=kernel)


@MODES
def test_prescale_times_q_is_the_plain_fold(kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pairs = with_prescale(group(dtype=torch.float64))
    want = iter(plain(pairs))
    for inputs, (weight, bias, power) in zip(pairs, PackedPairs.pack(pairs).by_pair(fold_all(pairs)), strict=True):
        assert (power is not None) is inputs.prescale
        q = torch.ones_like(bias) if power is None else power.to(bias.dtype)
        undone = reference.scaled(weight, q, transposed=inputs.transposed, groups=inputs.groups)
        torch.testing.assert_close(undone, next(want))
        torch.testing.assert_close(bias * q, next(want))


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.float16)])
def test_group_equals_single_folds(interpreted, dtypes):
    pairs = group(dtype=dtypes[0], out_dtype=dtypes[1])
    got, want = fold_all(pairs), plain([p._replace(weight=p.weight) for p in pairs])
    tolerance = TOLERANCES[dtypes[1] or dtypes[0]]
    for g, w in zip(got, want, strict=True):
        assert (g.dtype, g.shape, g.stride()) == (w.dtype, w.shape, w.stride())
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)
    reached = [
        i for i, t in enumerate(want) if t.requires_grad
    ]  # b' of a pair without optional vectors has no gradient
    seeds = [torch.randn_like(want[i]) for i in reached]
    ours = torch.autograd.grad([got[i] for i in reached], leaves(pairs), seeds)
    theirs = torch.autograd.grad([want[i] for i in reached], leaves(pairs), seeds)
    for g, w in zip(ours, theirs, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        torch.testing.assert_close(g, w, rtol=4 * tolerance, atol=4 * tolerance)
    assert not [key for key in counters["triton_convbn"] if key.startswith("decomposed")]


@MODES
def test_only_needed_gradients_are_computed(kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = []
    real = library.fold_backward_op
    monkeypatch.setattr(
        library,
        "fold_backward_op",
        lambda grads, given, wanted, *rest: asked.append((given, wanted)) or real(grads, given, wanted, *rest),
    )
    inputs = pair("conv", 2, 1)
    inputs.bias.requires_grad_(False)
    inputs.weight.requires_grad_(False)
    weight, bias = fold_all([inputs])
    weight.sum().backward(retain_graph=True)
    assert inputs.bn_weight.grad is not None
    assert inputs.weight.grad is None
    bias.sum().backward()
    assert asked == [([1], [0b0100]), ([2], [0b1100])] or asked == [([3], [0b1100]), ([3], [0b1100])]


def test_gradient_of_statistics_raises():
    inputs = pair("conv", 2, 1)
    inputs.running_mean.requires_grad_(True)
    with pytest.raises(NotImplementedError, match=r"use reference.fold_reference"):
        fold_all([inputs])[1].sum().backward()


def test_unsupported_pairs_are_decomposed_and_counted(interpreted):
    inputs = pair("conv", 2, 1, requires_grad=False, dtype=torch.float32)
    strided = inputs._replace(weight=inputs.weight[:, ::2].expand(4, 2, 2, 2)[:, :, ::2])
    for got, want in zip(fold_all([strided]), plain([strided]), strict=True):
        torch.testing.assert_close(got, want)
    assert [n for key, n in counters["triton_convbn"].items() if key.startswith("decomposed:weight of shape")] == [1]


def test_public_fold_chooses_kernel_or_torch(monkeypatch):
    launched = []
    real = plan.run
    monkeypatch.setattr(plan, "run", lambda source, *rest: launched.append(source.name) or real(source, *rest))
    inputs = pair("transposed", 2, 2, dtype=torch.float32)
    arguments, options = inputs[:7], {"transposed": True, "groups": 2, "dtype": torch.float16}
    want = triton_convbn.fold(*arguments, **options)
    assert launched == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    got = triton_convbn.fold(*arguments, **options)
    assert launched == ["fold_1"]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype == torch.float16
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3)
    got[0].sum().backward()
    assert inputs.weight.grad is not None
    assert launched == ["fold_1", "fold_backward_1"]
    inputs.running_var.requires_grad_(True)
    triton_convbn.fold(*arguments, **options)[0].sum().backward()
    assert inputs.running_var.grad is not None
    assert launched == ["fold_1", "fold_backward_1"]
    with pytest.raises(TypeError, match=r"weight is torch\.int32"):
        triton_convbn.fold(inputs.weight.int(), *arguments[1:], **options)


def test_functional_transforms(interpreted):
    """Under grad, vmap and functional_call the public fold and the bare operator are plain torch."""
    inputs = pair("conv", 2, 1, dtype=torch.float64)
    weight = inputs.weight.detach()

    def loss(fold_one, weight):
        folded, bias = fold_one(inputs._replace(weight=weight))
        return folded.square().sum() + bias.sum()

    def public(pair):
        return triton_convbn.fold(*pair[:7])

    (want,) = torch.autograd.grad(loss(public, inputs.weight), inputs.weight)
    torch.testing.assert_close(torch.func.grad(partial(loss, public))(weight), want)
    ensemble = torch.func.vmap(partial(loss, public))(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(ensemble, torch.stack([loss(public, weight), loss(public, 2 * weight)]))
    torch.testing.assert_close(torch.func.grad(partial(loss, lambda pair: fold_all([pair])))(weight), want)
    conv, bn = nn.Conv2d(4, 4, 2), scramble(nn.Sequential(nn.BatchNorm2d(4)).eval())[0]
    x, other = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 2, 2)

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv, bn

        def forward(self, x):
            return triton_convbn.conv_bn_eval(self.conv, self.bn, x)

    got = torch.func.functional_call(Folded(), {"conv.weight": other}, (x,))
    torch.testing.assert_close(got, bn(nn.functional.conv2d(x, other, conv.bias)), rtol=1e-4, atol=1e-4)


@MODES
@pytest.mark.parametrize("kind", ["conv", "transposed"])
def test_requested_layout(kernel, kind, monkeypatch):
    """A contiguous weight is folded to channels_last, with the same values and gradients."""
    if kernel:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = pair(kind, 2, 1)._replace(memory_format=torch.channels_last)
    weight, bias = fold_all([inputs])
    want_weight, want_bias = plain([inputs])
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight, want_weight)
    torch.testing.assert_close(bias, want_bias)
    seeds = [torch.randn_like(weight), torch.randn_like(bias)]
    ours = torch.autograd.grad([weight, bias], leaves([inputs]), seeds)
    theirs = torch.autograd.grad([want_weight, want_bias], leaves([inputs]), seeds)
    for g, w in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, w)
    torch.library.opcheck(library.fold_op, tuple(PackedPairs.pack([inputs])))


def test_fold_is_a_function_of_its_own():
    """Not of the reference, so that `help` and pickle find it where users import it."""
    assert pickle.loads(pickle.dumps(triton_convbn.fold)) is triton_convbn.fold
    assert "kernel" in triton_convbn.fold.__doc__
