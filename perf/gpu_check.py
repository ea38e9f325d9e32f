"""Check values and speed on a GPU with one command.

    python3 perf/from_checkout.py gpu_check                from a checkout, on a machine with a GPU
    python3 perf/from_checkout.py gpu_check --dry-run      the same code on the CPU, kernels in Triton's interpreter
    python3 perf/from_checkout.py gpu_check --deep         the tuner, ncu and compute-sanitizer

The stages (gpu/plan.py) compare folds and gradients with fp64, run a model by eager, Inductor and ours, measure the
bandwidth of the fold groups, and time cuDNN's fused operators. Each task is a process, and each stage has a time limit.
Rows are appended to one CSV as soon as they are known, beside a log and a description of the machine, in the folder
$OUT or in out/.

Exit code: 0, 1 if a row failed, 2 for bad input or no GPU, 130 after Ctrl-C.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .gpu import plan

if TYPE_CHECKING:  # torch and triton are imported after TRITON_INTERPRET is set
    from .results import Report, Row

SECONDS = 540.0


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").partition("\n")[0])
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
    options.csv = options.csv or Path(os.environ.get("OUT") or "out") / f"{kind}_{stamp}.csv"
    return options


def obstacle(dry: bool) -> str | None:
    """Return in one line why nothing can be checked here, or None."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed in {sys.executable}"
    if dry:
        return None
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so no kernel would run on the GPU; unset it or pass --dry-run"
    import torch

    if not torch.cuda.is_available():
        return "no GPU that torch can use; --dry-run runs the same code on the CPU in Triton's interpreter"
    return None


def chosen(options: argparse.Namespace, scratch: Path) -> list[plan.Stage]:
    """Return the requested stages. Raises: UsageError for an unknown stage or model."""
    from triton_convbn.errors import UsageError
    from triton_convbn.models import load

    if options.model is not None:
        load(options.model)
    given = options.dry_run, options.model, options.csv
    found = plan.deep_stages(*given) if options.deep else plan.stages(*given, scratch)
    if options.stages is None:
        return found
    names = options.stages.split(",")
    if unknown := sorted(set(names) - {stage.name for stage in found}):
        known = ", ".join(stage.name for stage in found)
        raise UsageError(f"no such stage: {', '.join(unknown)}; choose from {known}")
    return [stage for stage in found if stage.name in names]


def main(given: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code."""
    begun = time.monotonic()
    options = arguments(given)
    why = obstacle(options.dry_run)
    if why is not None:
        return _refuse(why)
    os.environ["TRITON_INTERPRET"] = "1" if options.dry_run else "0"
    from triton_convbn.errors import UsageError
    from triton_convbn.versions import commit

    from .gpu.bench import Bench
    from .gpu.stages import Runner
    from .results import Log, Report, to_stderr

    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        os.environ |= {
            "TRITON_CONVBN_COMMIT": commit(),
            "TRITON_CONVBN_CACHE_DIR": os.environ.get("TRITON_CONVBN_CACHE_DIR") or str(scratch / "sources"),
        }
        try:
            options.csv = options.csv.absolute()
            stages = chosen(options, scratch)
            log = Log(options.csv)
        except (OSError, ValueError, UsageError) as error:
            return _refuse(str(error))
        device = Bench(options.dry_run).name
        report = Report(log, device, "interpreted" if options.dry_run else "ok", to_stderr())
        report.say(f"{device}; rows go to {options.csv}")
        runner = Runner(stages, report, {"dry": options.dry_run, "csv": str(options.csv)}, scratch, begun)
        code: int | None = None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner.run(options.seconds / SECONDS)
        except KeyboardInterrupt:
            code = 130
        finally:
            signal.signal(signal.SIGTERM, before)
            with options.csv.with_suffix(".log").open("a") as file:
                for child in runner.children.values():
                    file.write(f"==== {child.name}\n{child.log.read_text(errors='replace')}\n")
        rows = Log(options.csv).earlier[len(log.earlier) :]
        _summarize(report, rows, options, interrupted=code is not None)
    return code if code is not None else int(any(row.status == "failed" for row in rows))


def _refuse(why: str) -> int:
    print(f"gpu-check: {' '.join(why.split())}", file=sys.stderr)
    return 2


def _summarize(report: "Report", rows: "Sequence[Row]", options: argparse.Namespace, interrupted: bool) -> None:
    from .results import to_json

    statuses = dict(Counter(row.status for row in rows))
    if options.json:
        print(to_json(rows, csv=str(options.csv), statuses=statuses, interrupted=interrupted))
        return
    lines = [("case", "provider", "mode", "dtype", "batch", "metric", "p50", "unit", "status")]
    for row in rows:
        if row.unit not in ("ulp", "tensors", "powers of two") and "_turn_" not in row.metric:
            value = "" if row.p50 != row.p50 else f"{row.p50:.6g}"
            key = row.case, row.provider, row.mode, row.dtype, str(row.batch or "")
            lines.append((*key, row.metric, value, row.unit, row.status))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row.status in ("failed", "skipped"):
            print(f"{row.status}: {row.case} {row.provider} {row.mode} {row.dtype} {row.metric}: {row.error[:300]}")
    if interrupted:
        print("Interrupted: the remaining stages did not run.")
    if options.dry_run:
        print("Interpreted on the CPU: no figure above is of a GPU.")
    print(f"rows: {statuses}; {options.csv}")


if __name__ == "__main__":
    sys.exit(main())
