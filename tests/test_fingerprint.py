"""Inductor's caches tell graphs of one version of the package from those of another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import few

ROOT = Path(__file__).resolve().parent.parent
CHANGED = ("options.py", "ops/branches.py", "graph/merge.py", "kernels/codegen.py", "kernels/templates/__init__.py")
COUNT_HASHES = """
import sys
from triton_convbn.fingerprint import sources
found = {sources()}
for path in sys.argv[1:]:
    open(path, "a").write("# changed")
    sources.cache_clear()
    found.add(sources())
print(len(found))
"""


@pytest.mark.parametrize("linked", few([True, False], 1), ids=["links to a checkout", "installed"])
def test_each_source_file_counts(tmp_path, linked):
    skip = shutil.ignore_patterns("__pycache__")
    if linked:
        for folder in ("triton_convbn", "kernels", "perf"):
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
        subprocess.run([sys.executable, tmp_path / "perf" / "from_checkout.py"], check=True)
        path = tmp_path / "out" / "path"
    else:
        path = tmp_path
        shutil.copytree(ROOT / "triton_convbn", path / "triton_convbn", ignore=skip)
        shutil.copytree(ROOT / "kernels", path / "triton_convbn" / "kernels", ignore=skip)
    files = [str(path / "triton_convbn" / name) for name in CHANGED]
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", COUNT_HASHES, *files]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(run.stdout) == 1 + len(CHANGED), run.stderr
