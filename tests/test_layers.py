"""Imports go one way: no module imports one of a higher layer, and no modules import each other in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    [
        "triton_convbn.arguments",
        "triton_convbn.cpu",
        "triton_convbn.errors",
        "triton_convbn.options",
        "triton_convbn.counters",
        "triton_convbn.compat",
        "triton_convbn.compile_context",
        "triton_convbn.progress",
        "triton_convbn.versions",
    ],
    ["triton_convbn.kernels"],
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
    ["triton_convbn.perf"],
    ["triton_convbn.cli", "triton_convbn.__main__"],
]


def layer(module: str) -> int | None:
    """Return the height of a module's layer, or None if no layer lists it."""
    for height, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    return None


def modules() -> dict[str, Path]:
    """Return the files of the three packages by the names of an installation, without the package's lazy __init__."""
    named = {}
    for folder in ("triton_convbn", "kernels", "perf"):
        package = folder if folder == "triton_convbn" else f"triton_convbn.{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join([package, *parts]).removesuffix(".__init__")] = path
    named.pop("triton_convbn")
    return named


def imports(module: str, path: Path, types: bool = True) -> set[str]:
    """Return what a file imports, at its top and inside functions; relative names are made absolute.

    types: Include what is imported for annotations alone.
    """
    found = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in nodes(ast.parse(path.read_text()), types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    """Yield a tree's nodes, without the bodies of `if TYPE_CHECKING:` unless `types`."""
    if not types and isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from nodes(child, types)


def module_of(name: str, known: dict[str, Path]) -> str:
    """Return the module that an imported name is, or is in, or "" if it is not of these packages."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def test_every_module_has_a_layer() -> None:
    assert [module for module in modules() if layer(module) is None] == []


def test_every_layer_lists_modules_that_exist() -> None:
    assert [name for names in LAYERS for name in names if name not in modules()] == []


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


def test_no_circle_of_imports() -> None:
    """Raise CycleError with the modules of a circle if there is one."""
    known = modules()
    imported = {
        module: {module_of(name, known) for name in imports(module, path, types=False)} - {module, ""}
        for module, path in known.items()
    }
    TopologicalSorter(imported).prepare()
