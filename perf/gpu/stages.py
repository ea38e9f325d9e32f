"""List the stages of the GPU check and their time limits, most wanted first."""

from pathlib import Path
from typing import Any, NamedTuple

TRAINED = ("eager", "inductor", "inductor_efficient_conv_bn", "triton_convbn")
GRAPHS = tuple(f"{name}_reduce_overhead" for name in TRAINED[1:])
INFERRED = ("eager", "inductor", "triton_convbn", "triton_convbn_always", "inductor_freezing", "triton_convbn_freezing")

# seconds, mode, dtype, batch, providers
MODELS = (
    (80, "train", "autocast_bfloat16", 32, TRAINED),
    (50, "train", "float32", 32, TRAINED),
    (70, "train", "autocast_bfloat16", 8, TRAINED + GRAPHS),
    (45, "infer", "autocast_bfloat16", 8, INFERRED),
    (40, "infer", "float32", 8, INFERRED),
)
DRY_MODELS = (
    (150, "train", "autocast_bfloat16", 2, ("eager", "inductor", "triton_convbn_reduce_overhead")),
    (100, "infer", "float32", 2, ("eager", "triton_convbn_freezing")),
)

SPECIAL = ("on_nan", "misaligned", "with_gaps", "second_device", "side_stream", "cuda_graph", "huge")
"""Tests of tests/gpu beside those of dtypes and shapes. Each has a process of its own on a GPU."""


class Task(NamedTuple):
    """A process. It calls function, "module:name", with the device, the report and the arguments."""

    name: str
    function: str
    arguments: dict[str, Any]


class Stage(NamedTuple):
    """Tasks that share a time limit.

    seconds: share of the budget. The stage ends when its own seconds and those of earlier stages are over.
    timed: tasks prepare during earlier stages, and are then timed in turn while all other processes are stopped.
    """

    name: str
    seconds: float
    tasks: tuple[Task, ...]
    timed: bool = True


def task(name: str, function: str, **arguments: Any) -> Task:
    return Task(name, f"triton_convbn.perf.gpu.{function}", arguments)


def stages(dry: bool, model: str | None, csv: Path, scratch: Path) -> list[Stage]:
    """Return the stages of a check. Their seconds add up to 540 at most."""
    selected = {shape: f"test_dtypes and -{shape}-" for shape in ("conv", "depthwise", "linear", "transposed_groups")}
    selected |= {name: f"test_{name}" for name in SPECIAL}
    if dry:
        selected = {"values": selected["conv"], "special": " or ".join(f"test_{name}" for name in SPECIAL)}
    checks = [task(name, "checks:values", select=select) for name, select in selected.items()]
    models = []
    for seconds, mode, dtype, batch, providers in DRY_MODELS if dry else MODELS:
        name = f"{mode}_{dtype}_{batch}"
        common = {"mode": mode, "dtype": dtype, "batch": batch, "exact": str(scratch / f"exact_{name}.pt")}
        tasks = [task(f"{name}_{each}", "models:run", model=model, provider=each, **common) for each in providers]
        models.append(Stage(name, seconds, tuple(tasks)))
    return [
        Stage("versions", 45, (task("versions", "checks:versions", csv=str(csv)),), timed=False),
        Stage("values", 85, tuple(checks), timed=False),
        *(stage for stage in models if stage.name.startswith("train")),
        Stage("folds", 45, (task("folds", "folds:folds", model=model),)),
        *(stage for stage in models if stage.name.startswith("infer")),
    ]


def deep_stages(dry: bool, model: str | None, csv: Path) -> list[Stage]:
    """Return the stages of --deep: Nsight Compute, Compute Sanitizer, the tuner."""
    return [
        Stage("traffic", 110, (task("traffic", "tools:traffic", model=model),)),
        Stage("memcheck", 80, (task("memcheck", "tools:sanitize", tool="memcheck"),)),
        Stage("racecheck", 90, (task("racecheck", "tools:sanitize", tool="racecheck"),)),
        Stage("tune", 255, (task("tune", "tools:tune", model=model, csv=str(csv), budget=10 if dry else 200),)),
    ]
