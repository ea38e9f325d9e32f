"""Check the parts of the documents that come from the code. `python tests/test_documents.py` rewrites them."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from triton_convbn import ConvBNPass
from triton_convbn.graph.reasons import Reason
from triton_convbn.options import Options

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]


def short(gm: fx.GraphModule) -> str:
    """Return the code of the forward without annotations, semicolons and Dynamo's long names of parameters."""
    code = gm.code[gm.code.index("    ") :]
    code = re.sub(r";  \w+(?: = \w+)* = None", "", code)
    code = re.sub(r"\b[lL]_\w+?_modules_(\d)_(?:parameters|buffers)_(\w+?)_\b", lambda m: f"{NAMES[m[1]]}_{m[2]}", code)
    code = re.sub(r"\b[lL]_(?:args_0|input)_\b", "x", code)
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    # Drop Dynamo's first lines, which rename its arguments.
    return "\n".join("    " + line for line in lines if not re.fullmatch(r"\w+ = \w+", line))


NAMES = {"0": "conv", "1": "bn"}


def graphs() -> dict[str, str]:
    """Return the graphs of how-it-works.md as Dynamo captures them, before and after the pass."""
    found: dict[str, str] = {}

    def backend(gm: fx.GraphModule, _inputs: Any) -> Any:
        found["before"] = short(gm)
        ConvBNPass(kernel="torch", when="always")(gm.graph)
        gm.recompile()
        found["after"] = short(gm)
        return gm.forward

    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(torch.randn(1, 3, 8, 8))
    return found


def with_graphs(text: str) -> str:
    for name, code in graphs().items():
        pattern = rf"(<!-- graph {name} -->\n).*?(<!-- end graph -->)"
        text = re.sub(pattern, lambda m, code=code: f"{m[1]}\n{code}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def with_reasons(text: str) -> str:
    rows = "".join(f"| `{reason.value}` | {reason.text} |\n" for reason in Reason)
    head = "<!-- reasons -->\n| reason | why |\n|---|---|\n"
    return re.sub(
        r"<!-- reasons -->\n.*?<!-- end reasons -->",
        lambda _: f"{head}{rows}<!-- end reasons -->",
        text,
        flags=re.DOTALL,
    )


def test_graphs_are_up_to_date() -> None:
    text = (DOCS / "how-it-works.md").read_text()
    assert with_graphs(text) == text, "run python tests/test_documents.py"
    assert "batch_norm" in text


def test_every_reason_is_in_the_support_table() -> None:
    text = (DOCS / "support.md").read_text()
    assert with_reasons(text) == text, "run python tests/test_documents.py"


def test_every_option_is_documented() -> None:
    text = (DOCS / "options.md").read_text()
    for field in fields(Options):
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert re.search(rf"^\| `{field.name}` \| `{re.escape(default)}`", text, re.MULTILINE), field.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_exist(path: Path) -> None:
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)\)", path.read_text()):
        assert "://" in link or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    """A file that a page names is in the repository, at the root or in one of its two packages."""
    named = re.findall(r"`((?:[\w.-]+/)+[a-z0-9_-]+\.(?:py|csv|md|txt))`", path.read_text())
    for name in named:
        places = (ROOT, ROOT / "triton_convbn", ROOT / "kernels")
        assert any((place / name).exists() for place in places), name


def test_files_of_how_it_works_exist() -> None:
    """Every file in the tree of how-it-works.md exists in its folder."""
    tree = (DOCS / "how-it-works.md").read_text().split("## Files")[1]
    folders: list[str] = []
    count = 0
    for line in re.findall(r"^( {4,}[\w.]+(?:/|\.py)(?:, \w+\.py)?)", tree, re.MULTILINE):
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        folders[depth:] = []
        names = line.strip().split(", ")
        for name in names:
            assert ROOT.joinpath(*folders, name).exists(), name
            count += 1
        if names[0].endswith("/"):
            folders.append(names[0].rstrip("/"))
    assert count > 30


if __name__ == "__main__":
    for name, write in (("how-it-works.md", with_graphs), ("support.md", with_reasons)):
        path = DOCS / name
        path.write_text(write(path.read_text()))
