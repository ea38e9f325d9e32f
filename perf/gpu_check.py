"""Check values and speed on a GPU with one command.

    python3 perf/from_checkout.py gpu_check                from a checkout, on a machine with a GPU
    python3 perf/from_checkout.py gpu_check --dry-run      the same code on the CPU, kernels in Triton's interpreter
    python3 perf/from_checkout.py gpu_check --deep         the tuner, ncu and compute-sanitizer

The stages compare folds and gradients with fp64, run a model with eager, Inductor and this package, and measure the
bandwidth of the fold groups. Each task is a process, and each stage has a time limit. Rows are appended to one CSV
as soon as they are known, beside a log and a description of the machine, in the folder $OUT or in out/.

Needs nothing but torch and triton: pytest for the values (tests/gpu), torchvision or timm for models by name. The tuner
needs the whole package.

Exit code: 0, 1 if a row failed, 2 for bad input or no GPU, 130 after Ctrl-C.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from triton_convbn.dispatch import interpreting
from triton_convbn.errors import UsageError, choose
from triton_convbn.models import load
from triton_convbn.versions import commit

from .gpu.device import device_of, report_of
from .gpu.processes import Stage, run, task
from .results import Row, read_rows, start, to_json

SECONDS = 540.0
"""The limit of a run, which the stages share. The most important ones come first."""

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


def main(given: Sequence[str] | None = None, command: str = "perf/from_checkout.py gpu_check") -> int:
    """Run the check and return the exit code. `command` is what the help calls it."""
    begun = time.monotonic()
    try:
        return _check(_arguments(given, command), begun)
    except UsageError as error:
        print(f"gpu-check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _arguments(given: Sequence[str] | None, command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=command, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="run the same code on the CPU; no figure is of a GPU")
    parser.add_argument("--deep", action="store_true", help="run the tuner, ncu and compute-sanitizer instead")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="append rows there; default: a new file in $OUT or out/"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--model", help="a torchvision or timm name, or package.module:callable (default resnet50)")
    parser.add_argument("--stages", help="run only these, comma-separated: values,folds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"limit of the run (default {SECONDS:.0f})")
    options = parser.parse_args(given)
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: must be more than 0")
    kind = "gpu_check" + "_deep" * options.deep + "_dry_run" * options.dry_run
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    options.csv = (options.csv or Path(os.environ.get("OUT") or "out") / f"{kind}_{stamp}.csv").absolute()
    return options


def _check(options: argparse.Namespace, begun: float) -> int:
    """Run the stages and print the summary, also after Ctrl-C. Raises: UsageError for bad input or no GPU."""
    if not options.dry_run and interpreting():
        raise UsageError("TRITON_INTERPRET is set, so no kernel would run on the GPU; unset it or pass --dry-run")
    if not options.dry_run and not torch.cuda.is_available():
        raise UsageError("no GPU that torch can use; --dry-run runs the same code on the CPU in Triton's interpreter")
    if options.model is not None:
        load(options.model)
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        asked = options.dry_run, options.model, options.csv
        found = deep_stages(*asked) if options.deep else check_stages(*asked, scratch)
        known = [stage.name for stage in found]
        names = choose("stage", options.stages.split(",") if options.stages else known, known)
        earlier = start(options.csv)
        report = report_of(device_of(options.dry_run), options.csv)
        report.say(f"{report.device}; rows go to {options.csv}")
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1" if options.dry_run else "0",
            "TRITON_CONVBN_CACHE_DIR": os.environ.get("TRITON_CONVBN_CACHE_DIR") or f"{folder}/sources",
            "TRITON_CONVBN_COMMIT": commit(),  # once, not in every process
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # SIGSTOP does not reach compile workers
            "OMP_NUM_THREADS": "2",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        common = {"dry": options.dry_run, "csv": str(options.csv)}
        chosen = [stage for stage in found if stage.name in names]
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            asyncio.run(run(chosen, report, common, environment, scratch, begun, options.seconds / SECONDS))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGTERM, before)
            with options.csv.with_suffix(".log").open("a") as file:
                for path in sorted(scratch.glob("*.log"), key=lambda path: path.stat().st_ctime):
                    file.write(f"==== {path.stem}\n{path.read_text(errors='replace')}\n")
    rows = read_rows(options.csv)[len(earlier) :]
    _print_summary(rows, options, interrupted)
    return 130 if interrupted else int(any(row.status == "failed" for row in rows))


def check_stages(dry: bool, model: str | None, csv: Path, scratch: Path) -> list[Stage]:
    """Return the stages of a check. Their seconds add up to 540 at most."""
    selected = {shape: f"test_dtypes and -{shape}-" for shape in ("conv", "depthwise", "linear", "transposed_groups")}
    selected |= {name: f"test_{name}" for name in SPECIAL}
    if dry:
        selected = {"values": selected["conv"], "special": " or ".join(f"test_{name}" for name in SPECIAL)}
    checks = [task(name, "tools:values", select=select) for name, select in selected.items()]
    models = []
    for seconds, mode, dtype, batch, providers in DRY_MODELS if dry else MODELS:
        name = f"{mode}_{dtype}_{batch}"
        common = {"mode": mode, "dtype": dtype, "batch": batch, "exact": str(scratch / f"exact_{name}.pt")}
        tasks = [task(f"{name}_{each}", "models:run", model=model, provider=each, **common) for each in providers]
        models.append(Stage(name, seconds, tuple(tasks)))
    return [
        Stage("versions", 45, (task("versions", "tools:versions", csv=str(csv)),), timed=False),
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


def _print_summary(rows: Sequence[Row], options: argparse.Namespace, interrupted: bool) -> None:
    statuses = dict(Counter(row.status for row in rows))
    if options.json:
        print(to_json(rows, csv=str(options.csv), statuses=statuses, interrupted=interrupted))
        return
    for row in rows:
        if row.status in ("failed", "skipped"):
            print(f"{row.status}: {' '.join(map(str, row.key))} {row.metric}: {row.error[:300]}")
        elif row.unit not in ("ulp", "tensors") and "_turn_" not in row.metric:  # hundreds that are right
            what = f"{row.case:28} {row.provider:38} {row.mode:8} {row.dtype:17} {row.batch or '':>3}"
            print(f"{what}  {row.metric:26} {row.p50:12.6g} {row.unit}")
    if interrupted:
        print("Interrupted: the remaining stages did not run.")
    if options.dry_run:
        print("Interpreted on the CPU: no figure above is of a GPU.")
    print(f"rows: {statuses}; {options.csv}")


if __name__ == "__main__":
    sys.exit(main())
