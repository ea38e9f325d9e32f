"""A process of its own that tunes the problems of the tests on their landscape: `tune_child.py STORE TUNED`.

Under torchrun it is a rank.
"""

import sys
from pathlib import Path

from tune_cases import GPU, Landscape, problems

from triton_convbn.tune.ranks import ranks
from triton_convbn.tune.run import Preset
from triton_convbn.tune.session import Session
from triton_convbn.tune.space import FULL
from triton_convbn.tune.target import Target


def main(store: str, tuned: str) -> None:
    with ranks() as mine:
        session = Session(Target(GPU), Preset(FULL, "local"), mine, store=Path(store), tuned=Path(tuned), json=True)
        session.run(problems(), Landscape())


if __name__ == "__main__":
    main(*sys.argv[1:])
