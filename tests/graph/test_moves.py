"""Calls between a convolution and its BatchNorm that move elements, and several BatchNorms of one output."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import Calls, in_parts, transposed
from checking import TOLERANCES, check, counted, dynamo, errors, inductor, results, scramble
from torch import Tensor, nn
from torch._dynamo.utils import counters
from versions import needs_torch

from triton_convbn import ConvBNPass, explain, fold_exported
from triton_convbn.graph.reasons import Reason

SHAPE = (4, 4, 9, 8)


def make(call, **modules):
    torch.manual_seed(0)
    own = {"linear": nn.Linear(8, 5), "conv": nn.Conv2d(4, 6, 3), "bn": nn.BatchNorm2d(6), "other": nn.BatchNorm2d(6)}
    return scramble(Calls(call, **own | modules).eval(), 1e-3)


FOLDS = {
    "index": lambda m, x: m.bn(m.conv(x)[:, :, 1:, ::2]),
    "ellipsis": lambda m, x: m.bn(m.conv(x)[..., 1:]),
    "half of the batch": lambda m, x: m.bn(m.conv(x)[:2]),
    "narrow": lambda m, x: m.bn(m.conv(x).narrow(-1, 1, 2)),
    "select and unsqueeze": lambda m, x: m.bn(m.conv(x).select(3, 1).unsqueeze(3)),
    "index that adds a dimension": lambda m, x: m.bn(m.conv(x)[:, :, 0, :, None]),
    "index select": lambda m, x: m.bn(m.conv(x).index_select(2, torch.tensor([0, 0, 3]))),
    "flip": lambda m, x: m.bn(torch.flip(m.conv(x), (0, 3))),
    "roll": lambda m, x: m.bn(torch.roll(m.conv(x), (1, 2), (2, 3))),
    "roll of the batch": lambda m, x: m.bn(torch.roll(m.conv(x), 1, 0)),
    "space transposed": lambda m, x: m.bn(m.conv(x).transpose(2, 3)),
    "input transposed": lambda m, x: m.bn(m.conv(x.mT)),
    "moved away and back": lambda m, x: m.bn(m.conv(x).movedim(1, -1).flatten(1, 2).mT.unflatten(2, (7, 6))),
    "swapped": lambda m, x: m.bn(m.conv(x).swapaxes(0, 2)),
    "unfold": lambda m, x: m.bn(m.conv(x).unfold(2, 3, 1).flatten(3)),
    "diagonal": lambda m, x: m.bn(m.conv(x).diagonal(0, 2, 3)[..., None]),
    "replicate": lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 0, 2), "replicate")),
    "circular": lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 0, 2), "circular")),
    "split": lambda m, x: m.bn(torch.split(m.conv(x), 3)[0]),
    "unbind": lambda m, x: m.bn(m.conv(x).unbind(2)[1].unsqueeze(2)),
    "tensor_split": lambda m, x: m.bn(torch.tensor_split(m.conv(x), 3, 3)[2]),
    "linear moved": lambda m, x: m.bn(F.pad(m.linear(x).movedim(-1, 1), (0, -1))).movedim(1, -1),
}


@pytest.mark.parametrize("codegen", [True, False])
@pytest.mark.parametrize("name", FOLDS)
def test_folds(name, codegen):
    model = make(FOLDS[name], **({"bn": nn.BatchNorm2d(5)} if "linear" in name else {}))
    x = torch.randn(SHAPE)
    run = dynamo(model, codegen=codegen)
    check(run, model, x)
    assert counted() == (1, {})
    if not codegen:  # else they are those that Inductor gives a BatchNorm, which keeps the order of its input's
        assert run(x).stride() == model(x).stride()


def written_part(m, x):
    first, second = m.conv(x).chunk(2)
    second.mul_(2)
    return m.bn(first) + m.bn(second)


def written_statistics(m, x):
    first, second = m.conv(x).chunk(2)
    z = m.bn(first)
    m.bn.running_mean.add_(1)
    return z + m.bn(second)


def written_inner(m, x):
    z = m.bn(m.conv(x))
    m.bn.running_mean.add_(1)
    return m.other(z)


STAYS = {
    "zeros": (lambda m, x: m.bn(F.pad(m.conv(x), (1, 0))), [Reason.PADDED]),
    "a crop of the channels": (lambda m, x: m.bn(m.conv(x)[:, 1:]), [Reason.CHANNELS_MOVED]),
    "channels in another order": (lambda m, x: m.bn(m.conv(x).flip(1)), [Reason.CHANNELS_MOVED]),
    "channels rolled": (lambda m, x: m.bn(m.conv(x).roll(1, 1)), [Reason.CHANNELS_MOVED]),
    "all rolled": (lambda m, x: m.bn(m.conv(x).roll(1)), [Reason.INPUT_NOT_CONV]),
    "all rolled, by a list": (lambda m, x: m.bn(torch.roll(m.conv(x), 3, [])), [Reason.INPUT_NOT_CONV]),
    "channels to the batch": (lambda m, x: m.bn(m.conv(x).transpose(0, 1)), [Reason.CHANNELS_MOVED]),
    "channels by a tensor": (
        lambda m, x: m.bn(m.conv(x)[:, torch.tensor([1, 0, 2, 3, 4, 5])]),
        [Reason.INPUT_NOT_CONV],
    ),
    "a chunk of the channels": (
        lambda m, x: (lambda y: m.bn(y[0]) + m.bn(y[1]))(m.conv(x).chunk(2, 1)),
        [Reason.CHANNELS_MOVED] * 2,
    ),
    "parts of two BatchNorms": (
        lambda m, x: (lambda y: m.bn(y[0]) + m.other(y[1]))(m.conv(x).chunk(2)),
        [Reason.CONV_SHARED] * 2,
    ),
    "a part read elsewhere": (lambda m, x: (lambda y: m.bn(y[0]) + y[1])(m.conv(x).chunk(2)), [Reason.CONV_SHARED]),
    "a part with channels elsewhere": (
        lambda m, x: (lambda y: m.bn(y[0]).sum() + m.bn(y[1][:, :, :6, :6].transpose(1, 2)).sum())(m.conv(x).chunk(2)),
        [Reason.CONV_SHARED] * 2,
    ),
    "a crop read elsewhere": (
        lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)[:, :, 1:]),
        [Reason.CONV_SHARED],
    ),
    "a written part": (written_part, [Reason.CONV_SHARED] * 2),
    "statistics written between the parts": (written_statistics, [Reason.MUTATED, Reason.CONV_SHARED]),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    call, reasons = STAYS[name]
    channels = {"a crop of the channels": 5, "a chunk of the channels": 3, "channels to the batch": 4}.get(name, 6)
    model = make(call, bn=nn.BatchNorm2d(channels))
    x = torch.randn(SHAPE)
    ran, eager = copy.deepcopy(model), copy.deepcopy(model)
    with torch.set_grad_enabled("written" not in name):
        found = [row.reason for row in explain(model, x).rows if row.reason != "not_reached"]
        assert found == [reason.value for reason in reasons]
        want, found = results(eager, eager, x), results(dynamo(ran), ran, x)
    for what, error in errors(found, want).items():
        assert error < TOLERANCES[torch.float32], f"{what}: {error:.2e}"


def test_a_write_between_two_batch_norms():
    """The first one folds alone: its statistics are written before the second one would read them."""
    model = make(written_inner)
    x = torch.randn(SHAPE)
    ran, eager = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(dynamo(ran)(x), eager(x), rtol=1e-4, atol=1e-4)
    assert counted() == (1, {"mutated": 1})


def test_an_output_between_two_batch_norms_that_is_read():
    model = make(lambda m, x: (lambda z: m.other(z) + z)(m.bn(m.conv(x))))
    check(dynamo(model), model, torch.randn(SHAPE))
    assert counted() == (1, {"conv_shared": 1})


def test_explain_lists_all_batch_norms_of_one_fold():
    model = make(lambda m, x: m.other(m.bn(m.conv(x))))
    assert [(row.batch_norm, row.conv) for row in explain(model, torch.randn(SHAPE)).rows] == [
        ("bn", "conv"),
        ("other", "conv"),
    ]
    model = make(in_parts)
    assert [(row.batch_norm, row.conv) for row in explain(model, torch.randn(SHAPE)).rows[:2]] == [("bn", "conv")] * 2


def test_declines_of_one_fold_are_together():
    model = make(lambda m, x: m.other(m.bn(m.conv(x)))).requires_grad_(False)
    check(dynamo(model, when="profitable", codegen=True), model, torch.randn(SHAPE))
    assert counted() == (0, {"does_not_pay": 2})


def test_second_derivatives_of_several_batch_norms():
    model = make(lambda m, x: m.other(m.bn(m.conv(x)[:, :, 1:]))).double()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def penalty(run):
        grads = torch.autograd.grad(
            run(x).square().sum(), [x, *model.parameters()], create_graph=True, allow_unused=True
        )
        total = sum(grad.square().sum() for grad in grads if grad is not None)
        return torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)

    for found, want in zip(penalty(dynamo(model, codegen=False)), penalty(model), strict=True):
        assert (found is None) == (want is None)
        if found is not None:
            torch.testing.assert_close(found, want)
    assert counted() == (2, {})


@pytest.mark.parametrize("call", [transposed, lambda m, x: m.other(m.bn(m.conv(x).chunk(2)[0]))])
def test_dynamic_batch(call):
    sizes = (3, 5, 6)
    own = {"bn": nn.BatchNorm1d(5)} if call is transposed else {}
    model = make(call, **own)
    run = dynamo(model)
    for size in sizes:
        check(run, model, torch.randn((size, 7, 8) if call is transposed else (2 * size, *SHAPE[1:])))
    assert not any(name.startswith("declined") for name in counters["triton_convbn"])


@pytest.mark.parametrize("call", [transposed, FOLDS["index"], FOLDS["flip"]])
def test_batch_that_only_a_run_knows(call):
    model = make(call, **({"bn": nn.BatchNorm1d(5)} if call is transposed else {}))
    x = torch.randn((3, 7, 8) if call is transposed else SHAPE)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with torch.no_grad():
        torch.testing.assert_close(dynamo(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", [in_parts, lambda m, x: m.other(m.bn(m.conv(x)[:, :, 1:]))])
def test_fold_exported(call):
    model = make(call)
    del model.linear
    if call is in_parts:
        del model.other
    x = torch.randn(SHAPE)
    folded = fold_exported(torch.export.export(model, (x,)))
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-4, atol=1e-4)
    assert counted() == (2, {})
    assert sorted(folded.state_dict) == ["conv.folded_bias", "conv.folded_weight"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("index", "linear moved"),
        pytest.param("circular", marks=needs_torch(2, 12, "with AVX-512 the padding's own backward does not compile")),
    ],
)
def test_inductor(name):
    model = make(FOLDS[name], **({"bn": nn.BatchNorm2d(5)} if "linear" in name else {}))
    x = torch.randn(SHAPE)
    check(inductor(model), model, x)
    assert counted() == (1, {})


def test_a_pass_by_hand_twice():
    model = make(in_parts)
    x = torch.randn(SHAPE)
    gm = torch.export.export(model, (x,)).module()
    for _ in range(2):
        before = gm.code
        ConvBNPass()(gm.graph)
        gm.recompile()
    assert gm.code == before


@pytest.mark.parametrize("codegen", [True, False])
def test_gradients_of_a_transposed_input_with_a_size_of_one(codegen):
    """Torch 2.14.1 takes it for channels_last in the BatchNorm's backward, so arithmetic is the reference."""
    model = make(lambda m, x: m.bn(m.linear(x).transpose(1, 3)), linear=nn.Linear(4, 5), bn=nn.BatchNorm2d(5)).double()
    x = torch.randn(3, 4, 1, 4, dtype=torch.float64)
    weights = torch.randn(3, 5, 1, 4, dtype=torch.float64)

    def gradients(run):
        output = run(x)
        parameters = [*model.linear.parameters(), *model.bn.parameters()]
        return output, torch.autograd.grad((output * weights).sum(), parameters)

    def arithmetic(x):
        scale = model.bn.weight * torch.rsqrt(model.bn.running_var + model.bn.eps)
        shift = model.bn.bias - model.bn.running_mean * scale
        return (model.linear(x) * scale + shift).transpose(1, 3)

    torch.testing.assert_close(gradients(dynamo(model, codegen=codegen)), gradients(arithmetic))
    assert counted() == (1, {})


class Parts(nn.Module):
    """One BatchNorm on both halves of a batch. One half is written to, the other one is saved by a convolution."""

    def __init__(self, chunks: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2)
        self.chunks = chunks

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        first, second = y.chunk(2) if self.chunks else (y[:2], y[2:])
        return self.after(self.norm(first)).sum() + F.relu(self.norm(second), inplace=True).square().sum()


def one_part(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x).unbind()[0][None]), inplace=True).square().sum()


@pytest.mark.parametrize(
    ("make_model", "folds"),
    [(partial(Parts, chunks=False), 2), (partial(Parts, chunks=True), 2), (partial(make, one_part), 1)],
)
def test_a_part_that_is_written_to(make_model, folds) -> None:
    """As views of one tensor the parts share what autograd counts writes by."""
    model = scramble(make_model().double().eval())
    x = torch.randn(4, model.conv.in_channels, 6, 6, dtype=torch.float64)
    parameters = [*model.conv.parameters(), *(model.norm if folds == 2 else model.bn).parameters()]
    run = torch.compile(model, backend="triton_convbn_eager")
    found = torch.autograd.grad(run(x), parameters)
    assert counters["triton_convbn"]["folded"] == folds
    torch.testing.assert_close(found, torch.autograd.grad(model(x), parameters))


def test_a_part_that_is_returned_can_be_written_to() -> None:
    model, x = make(lambda m, x: m.bn(m.conv(x).chunk(2)[0])), torch.randn(SHAPE)
    found = torch.compile(model, backend="triton_convbn_eager")(x)
    assert counters["triton_convbn"]["folded"] == 1
    torch.testing.assert_close(found.relu_(), model(x).relu_())


CROPPED = {
    "with gaps": lambda m, x: m.bn(m.conv(x)[..., ::2]),
    "expanded": lambda m, x: m.bn(m.conv(x)[:, :, :1].expand(-1, -1, 3, -1)),
    "cropped": lambda m, x: m.bn(m.conv(x)[..., 1:, :]),
    "whole": lambda m, x: m.bn(m.conv(x)),
}


@pytest.mark.parametrize("name", CROPPED)
@pytest.mark.parametrize("width", [3, 7])
def test_strides_that_the_kernel_of_a_cpu_gives(name, width):
    """An eager BatchNorm decides by its input, and a fake tensor of its output does not tell."""
    model = make(CROPPED[name])
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 7, width).to(memory_format=layout)
        got, want = dynamo(model, codegen=False)(x), model(x)
        strides = zip(got.stride(), want.stride(), want.shape, strict=True)
        assert all(one == other for one, other, size in strides if size > 1)
    assert counted() == (2, {})


@pytest.mark.parametrize("channels", [1, 4], ids=["one_channel", "one_position"])
def test_strides_of_dimensions_of_size_1(channels):
    """`interpolate` returns channels_last for those of a convolution, and contiguous for those of a BatchNorm."""
    pool = nn.AdaptiveAvgPool2d(1) if channels > 1 else nn.Identity()
    layers = nn.Sequential(pool, nn.Conv2d(4, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    model = scramble(nn.Sequential(layers, nn.Upsample(size=(2, 2), mode="bilinear")).eval())
    x = torch.randn(2, 4, 7, 5).contiguous(memory_format=torch.channels_last)
    for run in (
        torch.compile(model, backend="triton_convbn_eager"),
        fold_exported(torch.export.export(model, (x,))).module(),
    ):
        assert run(x).stride() == model(x).stride()
        torch.testing.assert_close(run(x), model(x))
    assert counters["triton_convbn"]["folded"] == 2


def test_gradients_of_one_image_that_is_transposed():
    """Torch 2.14.1's own gradients of such a BatchNorm are wrong on a CPU, so the batch is compared with two of it."""
    model = scramble(nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()).double()
    x, weight = torch.randn(1, 4, 3, 3).double(), torch.randn(1, 9, 8).double()

    def gradients(run, copies):
        y = run(x.expand(copies, -1, -1, -1)).flatten(2).transpose(1, 2)
        return torch.autograd.grad((y * weight).sum() / copies, list(model.parameters()))

    found = gradients(torch.compile(model, backend="triton_convbn_eager"), 1)
    torch.testing.assert_close(found, gradients(model, 2))
