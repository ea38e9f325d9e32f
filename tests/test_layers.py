"""Imports go one way: no module imports one of a higher layer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    [
        "triton_convbn.arguments",
        "triton_convbn.errors",
        "triton_convbn.options",
        "triton_convbn.counters",
        "triton_convbn.compat",
        "triton_convbn.compile_context",
        "triton_convbn.progress",
        "triton_convbn.versions",
    ],
    ["kernels"],
    ["triton_convbn.fingerprint", "triton_convbn.dispatch"],
    ["triton_convbn.ops"],
    ["triton_convbn.post_grad"],
    ["triton_convbn.graph"],  # installs the passes after autograd for what it folds
    [
        "triton_convbn.inductor",
        "triton_convbn.eager",
        "triton_convbn.eager_modules",
        "triton_convbn.export",
        "triton_convbn.export_constants",
        "triton_convbn.export_program",
        "triton_convbn.capture",
        "triton_convbn.explanation",
        "triton_convbn.example_inputs",
        "triton_convbn.freeze",
        "triton_convbn.kernel_view",
    ],
    ["triton_convbn.measure", "triton_convbn.models"],
    ["triton_convbn.tune"],
    ["perf"],
    ["triton_convbn.cli", "triton_convbn.__main__"],
]


def layer(module: str) -> int | None:
    """Return the height of a module's layer, or None if no layer lists it."""
    for height, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    return None


def modules() -> dict[str, Path]:
    """Return the files of the three packages by module name, without the package's lazy __init__."""
    paths = [path for folder in ("triton_convbn", "kernels", "perf") for path in (ROOT / folder).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    named.pop("triton_convbn")
    return named


def imports(module: str, path: Path) -> set[str]:
    """Return what a file imports, at its top and inside functions; relative names are made absolute."""
    found = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert [module for module in modules() if layer(module) is None] == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    height = layer(module)
    assert height is not None
    upward = [
        name
        for name in sorted(imports(module, modules()[module]))
        if (other := layer(name)) is not None and other > height
    ]
    assert upward == []
