"""Run a module of this folder from a checkout as if the package were installed: no make, no pip, no git.

    python3 perf/from_checkout.py gpu_check --dry-run

The package's folders are linked under out/path, which is put on the path of the module.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = """[torch_dynamo_backends]
triton_convbn = triton_convbn.inductor:backend
triton_convbn_eager = triton_convbn.inductor:eager_backend
"""


def link_tree(target: Path) -> Path:
    """Link what an installation would contain into `target`. Existing links stay. Return `target`."""
    package, metadata = target / "triton_convbn", target / "triton_convbn-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    for link in package.iterdir():
        if not link.exists():
            link.unlink()  # what it pointed to is gone
    for source in (*(ROOT / "triton_convbn").iterdir(), ROOT / "kernels", ROOT / "perf"):
        link = package / source.name
        if not link.exists():
            link.symlink_to(os.path.relpath(source, package))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: triton_convbn\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return target


def main() -> None:
    """Make the links, and run the module that the first argument names, if any."""
    path = os.pathsep.join(filter(None, [str(link_tree(ROOT / "out" / "path")), os.environ.get("PYTHONPATH")]))
    if len(sys.argv) > 1:
        environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        module = f"triton_convbn.perf.{sys.argv[1]}"
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[2:]], environment)


if __name__ == "__main__":
    main()
