"""The interpreted kernels that merge sums of branches compared with fp64."""

from __future__ import annotations

import random

import pytest
import torch
from exact_merge import exact_merge, exact_merge_gradients
from tiers import few
from torch import Tensor
from triton_convbn.kernels.codegen_merge import generate_merge, generate_merge_backward
from triton_convbn.kernels.config import EMITS, KernelConfig
from triton_convbn.kernels.inputs import Unsupported
from triton_convbn.kernels.launch import launch
from triton_convbn.kernels.merge_inputs import largest_of, merge_grad_spec_of, merge_spec_of
from triton_convbn.kernels.testing import Exact, Guarded, out_of_bounds

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Sum = tuple[list[Tensor], Tensor, torch.dtype]


def laid_out(tensor: Tensor, last: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if last and tensor.ndim in formats else tensor


def random_sum(rng: random.Random) -> Sum:
    """Return weights, scales and the dtype of the merged weight: any shape, dtype mix and layout that merges."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    dimensions = rng.choice((1, 2, 2, 2, 3))
    channels, groups = rng.choice(((6, 1), (12, 3), (40, 40), (11, 1), (16, 2), (5, 5)))
    largest = [rng.choice((1, 3) if dimensions == 3 else (1, 3, 5))] * dimensions
    sizes = [largest] * rng.randint(1, 3)
    sizes += [[rng.choice([k for k in (1, 3, 5) if k <= most]) for most in largest] for _ in range(rng.randint(0, 3))]
    rng.shuffle(sizes)
    weights = [
        laid_out(
            torch.randn(channels, channels // groups, *size, generator=generator).to(rng.choice(DTYPES)),
            rng.random() < 0.5,
        )
        for size in sizes
    ]
    wide = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    scales = torch.randn(len(weights) + rng.randint(0, 1), channels, generator=generator, dtype=wide)
    return weights, scales, rng.choice(DTYPES if wide == torch.float64 else DTYPES[:3])


def assert_exact(found: Tensor, exact: Exact, what: str) -> None:
    wrong = out_of_bounds(found, exact)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} off"


def read(one: Sum) -> dict[str, Tensor]:
    return {f"weight_{k}": weight for k, weight in enumerate(one[0])} | {"scales": one[1]}


def config_of(rng: random.Random) -> KernelConfig:
    return KernelConfig(block=rng.choice((256, 1024)), emit=rng.choice(EMITS))


@pytest.mark.parametrize("seed", range(10))
def test_merge(seed: int) -> None:
    """Write merged weights of random sums in one launch, into NaN outputs between guard bands."""
    rng = random.Random(seed)
    sums = [random_sum(rng) for _ in range(rng.randint(1, 3))]
    sums += sums[:1]  # equal specs, which emit="shared" shares
    guarded = [Guarded.like(largest_of(weights), dtype) for weights, _, dtype in sums]
    source = generate_merge(tuple(merge_spec_of(*one) for one in sums), config_of(rng))
    values = [read(one) | {"out": band.tensor} for one, band in zip(sums, guarded, strict=True)]
    launch(source, values, torch.device("cpu"))
    for number, ((weights, scales, _), band) in enumerate(zip(sums, guarded, strict=True)):
        assert band.intact()
        assert_exact(band.tensor, exact_merge(weights, scales), f"sum {number}")


@pytest.mark.parametrize("seed", few(range(10), 4))
def test_merge_backward(seed: int) -> None:
    """Write the needed gradients of random sums in one launch, from dW' in either layout. Twice gives the same bits."""
    rng = random.Random(1000 + seed)
    sums = [random_sum(rng) for _ in range(rng.randint(1, 3))]
    sums += sums[:1]
    specs, values, guarded = [], [], []
    for weights, scales, dtype in sums:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        grad = laid_out(torch.randn(largest_of(weights).shape, generator=generator).to(dtype), rng.random() < 0.5)
        needs = [rng.random() < 0.7 for _ in weights], rng.random() < 0.7
        bands = {f"d_weight_{k}": Guarded.like(weight) for k, weight in enumerate(weights) if needs[0][k]}
        bands |= {"d_scales": Guarded.like(scales)} if needs[1] else {}
        specs.append(merge_grad_spec_of(merge_spec_of(weights, scales, dtype), grad, *needs))
        values.append(read((weights, scales, dtype)) | {"grad": grad} | {n: band.tensor for n, band in bands.items()})
        guarded.append(bands)
    source = generate_merge_backward(tuple(specs), config_of(rng))
    launch(source, values, torch.device("cpu"))
    first = [{name: band.tensor.clone() for name, band in bands.items()} for bands in guarded]
    launch(source, values, torch.device("cpu"))
    for (weights, scales, _), own, bands, before in zip(sums, values, guarded, first, strict=True):
        of_weights, of_scales = exact_merge_gradients(own["grad"], weights, scales)
        exact = {f"d_weight_{k}": each for k, each in enumerate(of_weights)} | {"d_scales": of_scales}
        for name, band in bands.items():
            assert band.intact()
            assert band.tensor.equal(before[name])
            assert_exact(band.tensor, exact[name], name)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_scale_that_is_not_finite_stays_inside_its_kernel() -> None:
    weights = [torch.ones(2, 2, 3, 3), torch.ones(2, 2, 1, 1)]
    scales = torch.tensor([[1.0, 1.0], [torch.inf, torch.nan]])
    out = torch.empty(2, 2, 3, 3)
    source = generate_merge((merge_spec_of(weights, scales, torch.float32),))
    launch(source, [read((weights, scales, torch.float32)) | {"out": out}], torch.device("cpu"))
    assert (out.isfinite().sum((1, 2, 3)) == 16).all()


UNSUPPORTED = {
    "integers": [torch.ones(2, 2, 1, dtype=torch.int32)],
    "transposed": [torch.ones(2, 3, 3, 5).transpose(2, 3)],
    "no elements": [torch.ones(2, 0, 3, 3)],
    "no middle": [torch.ones(2, 2, 4), torch.ones(2, 2, 3)],
    "two devices": [torch.ones(2, 2, 3), torch.ones(2, 2, 3, device="meta")],
    "linear": [torch.ones(2, 2)],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str) -> None:
    weights = UNSUPPORTED[name]
    if name == "two devices":
        weights = [weights[1], weights[0]]
    with pytest.raises(Unsupported):
        merge_spec_of(weights, torch.ones(len(weights), 2), torch.float32)
