"""Everything that only a GPU can tell, by one command.

    python -m triton_convbn.perf.gpu_check                 on a machine with a GPU
    python -m triton_convbn.perf.gpu_check --dry-run       the same path on the CPU, kernels in Triton's interpreter

Values and gradients of the folds against fp64, a second device, a side stream, CUDA graphs, the bandwidth of the fold
groups, and a model's training step and inference against eager and Inductor. One tidy CSV, a row as soon as it is
known; what fails is a row with its error, and the rest goes on. It needs torch and triton, and nothing else.

Exit code: 0, 1 where a row failed, 2 for bad input or no GPU, 130 after Ctrl-C.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and triton are imported when the environment says what they are to do
    from .gpu_bench import Bench
    from .report import Report


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="the whole path on the CPU; no figure is of a GPU then")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="rows are appended there; default: a new file in out/")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    parser.add_argument("--model", help="a torchvision or timm name, or package.module:callable (default resnet50)")
    parser.add_argument("--batch", type=int, help="images in a batch (default 32; 2 in a dry run)")
    parser.add_argument("--steps", help="only these, by name and comma: values,cuda_graph,folds")
    parser.add_argument("--rounds", type=int, help="timed rounds of the model (default 20; 2 in a dry run)")
    options = parser.parse_args(given)
    for name, value in (("batch", options.batch), ("rounds", options.rounds)):
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    options.batch = options.batch or (2 if options.dry_run else 32)
    options.rounds = options.rounds or (2 if options.dry_run else 20)
    kind = "gpu_check_dry_run" if options.dry_run else "gpu_check"
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    options.csv = options.csv or Path(os.environ.get("OUT", "out")) / f"{kind}_{stamp}.csv"
    return options


def obstacle(dry: bool) -> str | None:
    """Why nothing can be checked here, in one line."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed in {sys.executable}"
    if dry:
        return None
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so no kernel would run on the GPU: unset it, or pass --dry-run"
    import torch

    if not torch.cuda.is_available():
        return "no GPU that torch can use; --dry-run runs the same path on the CPU, in Triton's interpreter"
    return None


def plan(bench: "Bench", report: "Report", options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The steps by name, in their order.

    Raises: UsageError for a model that is not known here.
    """
    from . import gpu_folds, gpu_models, gpu_values

    case = gpu_models.case(bench, options.model, report.say)
    subject = gpu_models.subject(case, options.batch, bench)
    return {
        "values": lambda: gpu_values.values(bench, report),
        "second_device": lambda: gpu_values.second_device(bench, report),
        "side_stream": lambda: gpu_values.side_stream(bench, report),
        "cuda_graph": lambda: gpu_values.cuda_graph(bench, report),
        "folds": lambda: gpu_folds.folds(bench, report, subject),
        "models": lambda: gpu_models.models(bench, report, case, options.batch, options.rounds),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    options = arguments(given)
    why = obstacle(options.dry_run)
    if why is not None:
        return _refuse(why)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("platformdirs") is None:  # which knows where a user's cache is
        os.environ.setdefault("TRITON_CONVBN_CACHE_DIR", tempfile.mkdtemp(prefix="triton_convbn-"))
    from triton_convbn.errors import UsageError

    from .gpu_bench import Bench
    from .report import Report, to_stderr
    from .table import Key, Log

    bench = Bench(options.dry_run)
    try:
        log = Log(options.csv)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    report = Report(log, bench.name, "interpreted" if bench.dry else "ok", to_stderr())
    report.say(f"{bench.name}; rows go to {options.csv}")
    code: int | None = None
    try:
        for name, step in plan(bench, report, options).items():
            if options.steps and name not in options.steps.split(","):
                continue
            report.say(f"step: {name}")
            with report.keeping(Key(name), "step"):
                step()
    except UsageError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        report.say(f"interrupted; {len(report.rows)} rows are in {options.csv}")
        code = 130
    finally:
        log.close()
    _summarize(report, bench, options)
    return code if code is not None else int(report.failures > 0)


def _refuse(why: str) -> int:
    print(f"gpu-check: {' '.join(why.split())}", file=sys.stderr)
    return 2


def _summarize(report: "Report", bench: "Bench", options: argparse.Namespace) -> None:
    from .table import to_json

    statuses = dict(Counter(row.status for row in report.rows))
    if options.json:
        print(to_json(report.rows, device=bench.name, csv=str(options.csv), statuses=statuses))
        return
    shown = [row for row in report.rows if row.status == "failed" or row.unit not in ("ulp", "tensors")]
    lines = [("case", "provider", "mode", "dtype", "metric", "p50", "unit", "status")]
    for row in shown:
        value = "" if row.p50 != row.p50 else f"{row.p50:.6g}"
        lines.append((row.case, row.provider, row.mode, row.dtype, row.metric, value, row.unit, row.status))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    checks = [row for row in report.rows if row.unit in ("ulp", "tensors")]
    failed = sum(row.status == "failed" for row in checks)
    print(f"\nvalues: {len(checks)} checked, {failed} failed; rows: {statuses}")
    for row in report.rows:
        if row.status == "failed":
            print(f"failed: {row.case} {row.provider} {row.mode} {row.dtype} {row.metric}: {row.error}")
    if bench.dry:
        print("Interpreted on the CPU: no figure above is of a GPU.")
    print(f"{options.csv}")


if __name__ == "__main__":
    sys.exit(main())
