"""Plans are reused for tensors with the same metadata, and for no others."""

import gc
import itertools
import json
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from triton_convbn.kernels import inputs, tuned, tuned_files
from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.perf.overhead import operator_cost

from triton_convbn.ops import library, plan
from triton_convbn.ops.packed_pairs import PackedPairs

C = 4
WANTED = [1 | 7 << 1, 1 | 6 << 1]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tuned_files.forget()


def pairs():
    generator = torch.Generator().manual_seed(0)

    def make(*size):
        return torch.randn(*size, generator=generator)

    return [
        FoldInputs(make(C, 4, 2, 2), make(C), make(C), make(C), make(C), make(C).abs() + 0.1, 1e-3),
        FoldInputs(make(4, 2, 2, 2), None, make(C), make(C), make(C), make(C).abs() + 0.1, 1e-3, True, 2),
    ]


def forward():
    return list(PackedPairs.pack(pairs()))


def backward():
    columns = forward()
    grads = [torch.randn_like(t) for pair in pairs() for t in (pair.weight, pair.running_mean)]
    return [grads, [3, 3], WANTED, [], *columns]


CALLS = {
    "fold": (forward, library.fold_op, library._fold, plan.plan_fold),
    "fold_backward": (backward, library.fold_backward_op, library._fold_backward, plan.plan_fold_backward),
}

# Each returns a tensor with other metadata, most with the same values.
MUTATIONS = {
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integers": lambda t: t.int(),
    "transposed": lambda t: t.transpose(0, -1),
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()])[1 : 1 + t.numel()].view(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "negated lazily": lambda t: torch._neg_view(t),
    "shorter": lambda t: t[:2],
    "another dimension": lambda t: t[None],
    "empty": lambda t: t[:0],
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


def places(args):
    """Return the places of the tensors of a call: (argument, index in its list)."""
    return [(i, j) for i, each in enumerate(args) for j, t in enumerate(each) if isinstance(t, torch.Tensor)]


def found(launched, call, *args):
    """Return the metadata of a call's outputs and its launches, or its error."""
    launched.clear()
    given = [t for each in args for t in each if isinstance(t, torch.Tensor)]
    try:
        outputs = call(*args)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return type(error)
    names = {id(t): ("input", i) for i, t in enumerate(given)} | {id(t): ("output", i) for i, t in enumerate(outputs)}
    launches = [(source, [names.get(id(t), t.stride()) for t in tensors]) for source, tensors, _ in launched]
    return launches, [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]


def mutated(args, *changes):
    args = [list(each) for each in args]
    for (i, j), name in changes:
        args[i][j] = MUTATIONS[name](args[i][j])
    return args


@pytest.mark.parametrize("name", CALLS)
def test_other_metadata_get_another_plan(name, monkeypatch):
    """Apply every mutation to every tensor, and random pairs of mutations, after an unmodified call."""
    make, operator, body, make_plan = CALLS[name]
    launched = []
    monkeypatch.setattr(plan, "run", lambda *arguments: launched.append(arguments))
    args = make()
    single = [[(place, mutation)] for place in places(args) for mutation in MUTATIONS]
    chance = random.Random(0)
    double = [chance.sample(single, 2) for _ in range(40)]
    cases = [*single, *([*a, *b] for a, b in double if a[0][0] != b[0][0])]
    outcomes = []
    for changes in cases:
        operator(*args)
        other = mutated(args, *changes)
        # The dispatcher resolves lazily negated tensors for both.
        other = [[t.resolve_neg() if isinstance(t, torch.Tensor) else t for t in each] for each in other]
        outcomes.append(found(launched, operator, *other))
        if all(other[i][j].device.type == "cpu" for i, j in places(other)):
            assert outcomes[-1] == found(launched, partial(body, make_plan), *other), changes
    taken = [each for each in outcomes if isinstance(each, tuple)]
    assert sum(bool(launches) for launches, _ in taken) > len(cases) // 4
    assert sum(not launches for launches, _ in taken) > len(cases) // 10


def test_lazily_negated_tensor():
    args = forward()
    library.fold_op(*args)
    weights = [torch._neg_view(t) for t in args[0]]
    for got, want in zip(
        library.fold_op(weights, *args[1:]), library.fold_op([-t for t in args[0]], *args[1:]), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_same_metadata_share_a_plan(name, monkeypatch):
    make, operator, *_ = CALLS[name]
    asked = []
    real = inputs.unsupported_reason
    monkeypatch.setattr(inputs, "unsupported_reason", lambda pair: asked.append(1) or real(pair))
    results = [operator(*make()) for _ in range(3)]
    assert len(asked) == 2  # once a pair
    for first, other in itertools.pairwise(results):
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, other, strict=True))


def test_unsupported_pairs_are_counted_on_every_call():
    args = mutated(forward(), ((0, 0), "strided"))
    for _ in range(3):
        library.fold_op(*args)
    assert [n for key, n in counters["triton_convbn"].items() if key.startswith("decomposed:weight of shape")] == [3]


@pytest.mark.parametrize("name", CALLS)
def test_plan_holds_no_tensor_and_returns_none_of_its_inputs(name):
    make, operator, *_ = CALLS[name]
    args = make()
    tensors = [t for each in args for t in each if isinstance(t, torch.Tensor)]
    outputs = operator(*args)
    pointers = {t.untyped_storage().data_ptr() for t in tensors}
    assert not pointers & {t.untyped_storage().data_ptr() for t in outputs}
    dead = [weakref.ref(t) for t in [*tensors, *outputs]]
    del args, tensors, outputs
    gc.collect()
    assert not any(ref() is not None for ref in dead)


def test_plans_are_bounded():
    """A model with dynamic shapes that makes ever new plans does not keep them all."""
    made = []

    def make():
        made.append(plan.Plan(torch.device("cpu")))
        return made[-1]

    for number in (*range(1025), 1024, 0):
        assert plan.reuse_plan(make, (), [], [], [[number]]) is not None
    assert len(made) == 1026, "the last plan is reused, and the first one, which is forgotten, is made again"


def test_plans_are_forgotten_with_the_tuned_files(monkeypatch):
    """A plan contains the configuration, so it is made again after the tuned files are read again."""
    launched = []
    monkeypatch.setattr(plan, "run", lambda source, *_: launched.append(len(source.text)))
    library.fold_op(*forward())
    monkeypatch.setattr(tuned, "config_for", lambda *_: KernelConfig(pairs_per_launch=1))
    library.fold_op(*forward())
    assert len(launched) == 2
    tuned_files.forget()
    library.fold_op(*forward())
    assert len(launched) == 4


def test_interpreter_variable_is_read_on_every_call(monkeypatch):
    launched = []
    real = plan.run
    monkeypatch.setattr(plan, "run", lambda *arguments: launched.append(1) or real(*arguments))
    args = forward()
    for value, want in (("1", 1), ("0", 1), ("1", 2)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        library.fold_op(*args)
        assert len(launched) == want


def test_inconsistent_arguments_raise():
    grads, given, wanted, _, *columns = backward()
    with pytest.raises(ValueError, match="powers of two"):
        library.fold_backward_op(grads, given, wanted, [torch.ones(C)], *columns[:-1], [True, False])
    with pytest.raises(ValueError, match="reached by a gradient"):
        library.fold_backward_op(grads[1:], [2, 3], wanted, [], *columns)


def test_nothing_to_fold():
    nothing = [[] for _ in PackedPairs._fields]
    assert library.fold_op(*nothing) == []
    assert library.fold_backward_op([], [], [], [], *nothing) == []


def test_threads_share_plans(monkeypatch):
    """Nothing is launched, because the interpreter is not thread-safe."""
    launched = []
    monkeypatch.setattr(plan, "run", lambda source, *_: launched.append(source))
    barrier = threading.Barrier(4)

    def call(_):
        barrier.wait(10)
        return library.fold_op(*forward())

    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(call, range(4)))
    assert len(launched) == 4
    assert len(set(launched)) == 1
    assert len({t.data_ptr() for outputs in every for t in outputs}) == sum(map(len, every))


def test_operator_cost_measures_calls_that_launch_nothing(capsys):
    operator_cost(calls=3, json_=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["case"], row["metric"]) for row in rows] == [
        (f"{name}_16_pairs", f"host_time_{metric}") for name in CALLS for metric in ("call", "body")
    ]
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    assert not [key for key in counters["triton_convbn"] if key.startswith("decomposed")]
