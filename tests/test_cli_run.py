"""`triton-convbn run`: a script or module runs as without it, with the pass in Inductor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_convbn.cli import main
from triton_convbn.errors import UsageError

SCRIPT = """
import sys
import torch
from torch import nn
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
model[1].running_mean.normal_()
model[1].running_var.uniform_(0.5, 2)
x = torch.randn(2, 3, 8, 8)
error = (torch.compile(model)(x) - model(x)).abs().max().item()
print("folded", counters["triton_convbn"]["folded"], "close", error < 1e-5)
"""


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test what `run` changes in its process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("process")
def test_run_passes_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside_it.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nimport beside_it\nprint(json.dumps([__name__, sys.argv]))\n")
    arguments = ["--kernel", "cuda", "-x", "--", "--help", "train", "--json", "--lr=0.1", ""]
    assert called("run", str(script), *arguments) == 0
    assert json.loads(capsys.readouterr().out) == ["__main__", [str(script), *arguments]]


@pytest.mark.usefixtures("process")
def test_run_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As python -m does: the current folder is on the path, and a package runs its __main__."""
    package = tmp_path / "package_of_the_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("train", "__main__"):
        (package / f"{name}.py").write_text(
            "import json, sys\nfrom . import __name__ as package\nprint(json.dumps([__name__, package, sys.argv]))\n"
        )
    monkeypatch.chdir(tmp_path)
    for name, file in (("package_of_the_user.train", "train.py"), ("package_of_the_user", "__main__.py")):
        assert called("run", "-m", "--no-recompute", name, "-m", "--lr=0.1") == 0
        expected = ["__main__", "package_of_the_user", [str(package / file), "-m", "--lr=0.1"]]
        assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_run_under_torchrun(tmp_path: Path) -> None:
    """torchrun starts the command once for each rank, and each patches its own process."""
    script = tmp_path / "script.py"
    # Each rank writes a file of its own: what two ranks print into one pipe may be mixed within a line.
    script.write_text(
        "import sys\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        f"sys.stdout = open({str(tmp_path)!r} + f'/rank{{dist.get_rank()}}.txt', 'w')\n{SCRIPT}"
    )
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, "-m", "triton_convbn", "run", "--when", "always", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank{rank}.txt").read_text() == "folded 1 close True\n"


@pytest.mark.usefixtures("process")
def test_run_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from torch._inductor import config\n"
        "from triton_convbn.compat import get_custom_graph_passes\n"
        "(one,) = get_custom_graph_passes(config.pre_grad_custom_pass)\n"
        "print(type(one).__name__, one.options.kernel, one.options.recompute, one.options.on_decline)\n"
    )
    options = ["--kernel", "torch", "--no-recompute", "--on-decline", "warn"]
    assert called("run", *options, str(script)) == 0
    assert capsys.readouterr().out.strip() == "ConvBNPass torch False warn"


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("sys.exit()", None), ("pass", 0)])
def test_run_exits_as_the_script_does(tmp_path: Path, ending: str, code: int | None) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\n{ending}\n")
    assert called("run", str(script)) == code


@pytest.mark.usefixtures("process")
def test_run_shows_the_error_of_the_script(tmp_path: Path) -> None:
    """A traceback in the script's own code is the user's to read: it is no bad input to this command."""
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('of the script')\n")
    with pytest.raises(ValueError, match="of the script"):
        main(["run", str(script)])


class OfTheScript(Exception):
    """An error with a method as the parser's have."""

    def format_message(self) -> str:
        return "one line"


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("error", ["EOFError('truncated')", "UsageError('own')", "OfTheScript()"])
def test_run_does_not_take_an_error_of_the_script_for_its_own(tmp_path: Path, error: str) -> None:
    script = tmp_path / "script.py"
    imports = "from triton_convbn.errors import UsageError\nfrom test_cli_run import OfTheScript\n"
    script.write_text(f"{imports}raise {error}\n")
    with pytest.raises((EOFError, UsageError, OfTheScript)):
        main(["run", str(script)])


def test_run_keeps_the_path_of_imports(tmp_path: Path) -> None:
    """With PYTHONSAFEPATH the first entry is of PYTHONPATH, and not of this command."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "of_the_user.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import of_the_user\n")
    for safe in ("", "1"):
        path = os.pathsep.join([str(tmp_path / "library"), *sys.path])
        environment = {**os.environ, "PYTHONSAFEPATH": safe, "PYTHONPATH": path}
        command = [sys.executable, "-m", "triton_convbn", "run", str(script)]
        assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("process")
def test_run_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert called("run", str(script)) == 0
    assert capsys.readouterr().out.strip() == "folded 1 close True"
