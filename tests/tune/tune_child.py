"""Tune the problems of the tests on their landscape: `tune_child.py STORE TUNED`. Under torchrun it is a rank."""

import sys
import time
from pathlib import Path

from tune_cases import HEADER, Landscape, problems

from triton_convbn.tune.cli import run
from triton_convbn.tune.problem import FULL
from triton_convbn.tune.run import Preset
from triton_convbn.tune.store import Store

if __name__ == "__main__":
    store, tuned = map(Path, sys.argv[1:])
    preset = Preset(FULL, "local")
    run(problems(), Landscape(), Store.open(store, HEADER), preset, time.monotonic(), tuned=tuned, json_=True)
