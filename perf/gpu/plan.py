"""List the stages of the GPU check and their time limits, most wanted first."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "triton_convbn.perf.gpu"
TRAINED = ("eager", "inductor", "inductor_efficient_conv_bn", "triton_convbn")
SPECIAL = ("unwritten", "addresses", "second_device", "side_stream", "cuda_graph", "huge")
INFERRED = ("eager", "inductor", "triton_convbn", "triton_convbn_always", "inductor_freezing", "triton_convbn_freezing")


class Task(NamedTuple):
    """A process. It calls function, "module:name", with the bench, the report and the arguments."""

    name: str
    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Tasks that share a time limit.

    seconds: share of the budget. The stage ends when its own seconds and those of earlier stages are over.
    timed: tasks prepare during earlier stages, and are then timed in turn while all other processes are stopped.
    """

    name: str
    seconds: float
    tasks: tuple[Task, ...] = field(repr=False)
    timed: bool = True


def stages(dry: bool, model: str | None, csv: Path, scratch: Path) -> list[Stage]:
    """Return the stages of a check. Their seconds add up to 540 at most."""

    def values(name: str, **arguments: Any) -> Task:
        return Task(name, f"{PACKAGE}.values:{name}", arguments)

    def setting(seconds: float, mode: str, dtype: str, batch: int, names: tuple[str, ...]) -> Stage:
        name = f"{mode}_{dtype}_{batch}"
        exact = str(scratch / f"exact_{name}.pt")
        common = {"model": model, "mode": mode, "dtype": dtype, "batch": batch, "exact": exact}
        made = []
        for each in names:
            provider, _, graphs = each.partition("+")
            more = {"provider": provider, "cuda_graphs": bool(graphs)}
            made.append(Task(f"{name}_{each}", f"{PACKAGE}.models:run", common | more))
        return Stage(name, seconds, tuple(made))

    if dry:
        checks = [values("values", part=0, parts=3), values("special", names=SPECIAL)]
    else:
        checks = [values("values", part=part, parts=4)._replace(name=f"values_{part}") for part in range(4)]
        checks += [values("special", names=[name])._replace(name=name) for name in SPECIAL]
    graphs = tuple(f"{name}+graphs" for name in TRAINED[1:])
    if dry:
        models = [
            setting(150, "train", "autocast_bfloat16", 2, ("eager", "inductor", "triton_convbn+graphs")),
            setting(100, "infer", "float32", 2, ("eager", "triton_convbn_freezing")),
        ]
    else:
        models = [
            setting(80, "train", "autocast_bfloat16", 32, TRAINED),
            setting(50, "train", "float32", 32, TRAINED),
            setting(70, "train", "autocast_bfloat16", 8, TRAINED + graphs),
            setting(45, "infer", "autocast_bfloat16", 8, INFERRED),
            setting(40, "infer", "float32", 8, INFERRED),
        ]
    training = [stage for stage in models if stage.name.startswith("train")]
    probe = {"model": model, "batch": 2 if dry else 32}
    return [
        Stage("versions", 45, (values("versions", csv=str(csv)),), timed=False),
        Stage("values", 85, tuple(checks), timed=False),
        *training,
        Stage("folds", 45, (Task("folds", f"{PACKAGE}.folds:folds", {"model": model}),)),
        Stage("fused_probe", 75, (Task("fused_probe", f"{PACKAGE}.probe:fused_probe", probe),)),
        *(stage for stage in models if stage not in training),
    ]


def deep_stages(dry: bool, model: str | None, csv: Path) -> list[Stage]:
    """Return the stages of --deep: Nsight Compute, Compute Sanitizer, the tuner."""

    def stage(name: str, seconds: float, function: str, **arguments: Any) -> Stage:
        return Stage(name, seconds, (Task(name, f"{PACKAGE}.tools:{function}", arguments),))

    return [
        stage("traffic", 110, "traffic", model=model),
        stage("memcheck", 80, "sanitize", tool_name="memcheck"),
        stage("racecheck", 90, "sanitize", tool_name="racecheck"),
        stage("tune", 255, "tune", model=model, csv=str(csv), budget=10 if dry else 200),
    ]
