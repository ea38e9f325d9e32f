"""Tune the problems of the tests on their landscape: `tune_child.py STORE TUNED`. Under torchrun it is a rank."""

import sys
from pathlib import Path

from tune_cases import HEADER, Landscape, problems

from triton_convbn.tune.run import Preset
from triton_convbn.tune.session import Session
from triton_convbn.tune.space import FULL

if __name__ == "__main__":
    store, tuned = map(Path, sys.argv[1:])
    Session(HEADER, Preset(FULL, "local"), store, tuned=tuned, json=True).run(problems(), Landscape())
