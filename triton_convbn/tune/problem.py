"""What is tuned: one call of a fold, forward or backward, described without its tensors."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..kernels.offline import TORCH_NAMES
from ..kernels.spec import GradSpec, PairSpec, backward_of, plan_groups, tuned_key

Direction = Literal["fold", "fold_backward"]
Specs = tuple[PairSpec, ...] | tuple[GradSpec, ...]


@dataclass(frozen=True)
class Problem:
    """One call: `specs` are its pairs in order, of one direction."""

    direction: Direction
    specs: Specs

    def __post_init__(self) -> None:
        kind = GradSpec if self.direction == "fold_backward" else PairSpec
        if not self.specs or not all(isinstance(spec, kind) for spec in self.specs):
            raise ValueError(f"a problem of {self.direction} is one or more of {kind.__name__}")

    @cached_property
    def tuned_key(self) -> str:
        """What the launcher looks the winner up by: "fold/fp32/large"."""
        return tuned_key(self.specs)

    @cached_property
    def key(self) -> str:
        """Names this problem and no other, on every machine: "fold/fp32/large/0123456789ab".

        Of what specs have come to say later only what is not the default counts: older records keep their names.
        """
        text = repr(self.specs).replace(", prescale=False", "").replace(", eps=1e-05", "")
        return f"{self.tuned_key}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def pairs(self) -> tuple[PairSpec, ...]:
        return tuple(spec.pair if isinstance(spec, GradSpec) else spec for spec in self.specs)

    @property
    def elements(self) -> int:
        """Of all weights together."""
        return sum(pair.numel for pair in self.pairs)

    def describe(self) -> str:
        count = len(self.specs)
        return f"{self.tuned_key}: {count} pair{'s' * (count != 1)}, {self.elements / 1e6:.2f} M elements"


def problems_of_calls(calls: Sequence[Specs]) -> list[Problem]:
    """One problem for each tuned key among the calls, its largest call; in the order of the keys' first calls."""
    found: dict[str, Problem] = {}
    for specs in calls:
        direction: Direction = "fold_backward" if isinstance(specs[0], GradSpec) else "fold"
        problem = Problem(direction, specs)
        known = found.get(problem.tuned_key)
        if known is None or known.elements < problem.elements:
            found[problem.tuned_key] = problem
    return list(found.values())


# ---- the calls of a model -------------------------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16")


def problems_of_model(name: str, dtype: str = "float32", channels_last: bool = False) -> list[Problem]:
    """What the pass would call for a model (see `models.load`), forward and backward: a problem for each tuned key.

    dtype: of parameters and input, or "autocast_" with that of autocast. Runs the model once, on the CPU, and needs
    torch. Raises: UsageError, for no such model or dtype, and for a model in which nothing folds.
    """
    if dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}; choose {', '.join(DTYPES)}")
    import torch

    from .. import models
    from ..kernel_view import kernels_of
    from ..options import Options

    model = models.load(name)
    x = models.example_input(model)
    plain = getattr(torch, dtype.removeprefix("autocast_"))
    autocast = dtype.startswith("autocast_")
    if not autocast:
        model, x = model.to(plain), x.to(plain)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", plain if autocast else torch.bfloat16, enabled=autocast):
        views = kernels_of(model, (x,), Options())
    if not views:
        raise UsageError(f"nothing folds in {name!r}; triton-convbn explain says why")
    return problems_of_calls([view.specs for view in views])


# ---- the calls of a file --------------------------------------------------------------------------------------------

_FIELDS = {
    "weight": None,
    "transposed": False,
    "groups": 1,
    "dtype": "float32",
    "batch_norm": None,
    "out": None,
    "bias": False,
    "affine": True,
    "channels_last": False,
    "out_channels_last": None,
    "count": 1,
}
_NAMES = {torchs.removeprefix("torch."): name for name, torchs in TORCH_NAMES.items()}


def problems_of_file(path: Path) -> list[Problem]:
    """Problems of a JSON file: a list of convolutions, in the order of the forward, each followed by a BatchNorm.

        [{"weight": [64, 3, 7, 7]},
         {"weight": [64, 64, 3, 3], "dtype": "bfloat16", "batch_norm": "float32", "count": 6},
         {"weight": [256, 64, 2, 2], "transposed": true, "groups": 1, "bias": true, "channels_last": true}]

    weight: its shape, [C_out, C_in / groups, *kernel], or transposed [C_in, C_out / groups, *kernel]. dtype: of the
    weight and its bias; batch_norm: of the BatchNorm, if another; out: of the folded weight, if another (autocast).
    affine: whether the BatchNorm has weight and bias. out_channels_last: of the folded weight, if another than the
    weight's channels_last. count: how often it comes in a row. groups matters to transposed ones only.

    Raises: UsageError, in a line that says which entry is wrong, and how.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{path} is not a list of convolutions such as [{{"weight": [64, 3, 7, 7]}}]')
    pairs: list[PairSpec] = []
    for number, entry in enumerate(entries):
        try:
            pairs += _pairs_of_entry(entry)
        except ValueError as error:
            raise UsageError(f"{path}, entry {number}: {error}") from error
    calls = [tuple(pairs[index] for index in call) for call in plan_groups(pairs, max_pairs=16, byte_budget=64 * 2**20)]
    return problems_of_calls([*calls, *(tuple(map(backward_of, call)) for call in calls)])


def _pairs_of_entry(entry: Any) -> list[PairSpec]:
    if not isinstance(entry, dict):
        raise ValueError(f"{json.dumps(entry)} is not an object")
    if unknown := sorted(set(entry) - set(_FIELDS)):
        raise ValueError(f"no field {', '.join(unknown)}; there are {', '.join(_FIELDS)}")
    field = _FIELDS | entry
    shape, groups, count = field["weight"], field["groups"], field["count"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(_positive(size) for size in shape):
        raise ValueError(f"weight is {json.dumps(shape)}, not a shape of two or more sizes")
    for name in ("transposed", "bias", "affine", "channels_last"):
        if not isinstance(field[name], bool):
            raise ValueError(f"{name} is {json.dumps(field[name])}, not true or false")
    if field["out_channels_last"] not in (None, True, False):
        raise ValueError(f"out_channels_last is {json.dumps(field['out_channels_last'])}, not true or false")
    for name in ("groups", "count"):
        if not _positive(field[name]):
            raise ValueError(f"{name} is {json.dumps(field[name])}, not a positive number")
    if field["transposed"] and shape[0] % groups:
        raise ValueError(f"{shape[0]} input channels in {groups} groups")
    dtypes = {}
    for name, fallback in (("dtype", "float32"), ("batch_norm", field["dtype"]), ("out", field["dtype"])):
        value = fallback if field[name] is None else field[name]
        if value not in _NAMES:
            raise ValueError(f"{name} is {json.dumps(value)}, not one of {', '.join(_NAMES)}")
        dtypes[name] = _NAMES[value]
    rows, cols, taps = shape[0], shape[1], math.prod(shape[2:])
    last, out_last = field["channels_last"], field["out_channels_last"]
    out_last = last if out_last is None else out_last
    if (last or out_last) and len(shape) not in (4, 5):
        raise ValueError(f"channels_last of a {len(shape)}-D weight")
    two_layouts = taps > 1 and cols > 1
    affine = dtypes["batch_norm"] if field["affine"] else None
    pair = PairSpec(
        rows=rows,
        cols=cols,
        taps=taps,
        weight=dtypes["dtype"],
        out=dtypes["out"],
        running_mean=dtypes["batch_norm"],
        running_var=dtypes["batch_norm"],
        bias=dtypes["dtype"] if field["bias"] else None,
        bn_weight=affine,
        bn_bias=affine,
        transposed=field["transposed"],
        groups=groups if field["transposed"] else 1,
        weight_last=two_layouts and last,
        out_last=two_layouts and out_last,
        prescale=dtypes["out"] == "fp16",  # as the pass folds it
    )
    return [pair] * count


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
