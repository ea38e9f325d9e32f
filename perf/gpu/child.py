"""Run one task of the GPU check in this process: `python -m triton_convbn.perf.gpu.child JSON`.

The task's function prepares up to its first `yield`. At each `yield` the process sends one byte to the parent and waits
for one. All output goes to stderr.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from ..results import Key, Log, Report, to_stderr
from .bench import Bench


def main() -> None:
    """Run the task that the first argument describes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    given = json.loads(sys.argv[1])
    sys.argv[:] = ["gpu_check", given["name"]]  # for the record of the environment
    replies = os.dup(1)
    os.dup2(2, 1)
    bench = Bench(given["dry"])
    log = Log(Path(given["csv"]))
    report = Report(log, bench.name, "interpreted" if bench.dry else "ok", to_stderr())
    with report.keeping(Key(given["name"]), "run"):
        module, _, name = given["function"].partition(":")
        turns = getattr(importlib.import_module(module), name)(bench, report, **given["arguments"])
        for _ in turns or ():
            os.write(replies, b".")
            if not os.read(0, 1):
                break


if __name__ == "__main__":
    main()
