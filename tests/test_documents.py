"""What the documents say of the code is what the code does. `python tests/test_documents.py` writes it anew."""

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

DOCS = Path(__file__).parent.parent / "docs"


def short(gm: fx.GraphModule) -> str:
    """The forward without annotations, semicolons and Dynamo's long names of parameters."""
    code = gm.code[gm.code.index("    ") :]
    code = re.sub(r";  \w+(?: = \w+)* = None", "", code)
    code = re.sub(r"\b[lL]_\w+?_modules_(\d)_(?:parameters|buffers)_(\w+?)_\b", lambda m: f"{NAMES[m[1]]}_{m[2]}", code)
    code = re.sub(r"\b[lL]_(?:args_0|input)_\b", "x", code)
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    # Dynamo's first lines give its arguments other names.
    return "\n".join("    " + line for line in lines if not re.fullmatch(r"\w+ = \w+", line))


NAMES = {"0": "conv", "1": "bn"}


def graphs() -> dict[str, str]:
    """The pair of how-it-works.md as Dynamo captures it, before and after the pass."""
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


def test_the_graphs_are_those_that_are_printed() -> None:
    text = (DOCS / "how-it-works.md").read_text()
    assert with_graphs(text) == text, "python tests/test_documents.py writes them anew"
    assert "batch_norm" in text


def test_every_reason_is_in_the_support_table() -> None:
    text = (DOCS / "support.md").read_text()
    assert with_reasons(text) == text, "python tests/test_documents.py writes it anew"


def test_every_option_is_documented() -> None:
    text = (DOCS / "options.md").read_text()
    for field in fields(Options):
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert re.search(rf"^\| `{field.name}` \| `{re.escape(default)}`", text, re.MULTILINE), field.name


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert "://" in link or (path.parent / link).exists(), link


if __name__ == "__main__":
    for name, write in (("how-it-works.md", with_graphs), ("support.md", with_reasons)):
        path = DOCS / name
        path.write_text(write(path.read_text()))
