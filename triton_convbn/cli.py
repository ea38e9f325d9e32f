"""The command line: `triton-convbn` and `python -m triton_convbn`.

Bad input is one line on stderr and exit code 2. Results go to stdout, progress to stderr; `--json` is for machines.
"""

import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .arguments import Model, PairsPerLaunch, Shapes, Size
from .errors import UsageError
from .options import Kernel, OnDecline, OptionError, Options, When
from .perf.cli import bench, demo, plot
from .perf.plan.cli import plan
from .progress import errors, print_table
from .tune.cli import tune

app = typer.Typer(
    help="Fold eval-mode BatchNorm into convolutions inside torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
dev = typer.Typer(help="Run the project's own measurements and checks.", no_args_is_help=True)
app.add_typer(dev, name="dev")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Recompute = Annotated[bool, typer.Option(help="Fold again in backward instead of keeping the folded weights.")]
WhenOption = Annotated[When, typer.Option("--when", help="Fold where it saves memory or time, or always.")]

for command in (bench, demo, plot, plan, tune):
    app.command()(command)

DEVELOPER = {
    "numerics": ("numerics:command", "Measure errors against fp64 by dtype."),
    "applications": ("applications:command", "Measure models of other packages: folds, memory, errors."),
    "pass-cost": ("overhead:pass_cost", "Measure what the pass adds to a compilation."),
    "operator-cost": ("overhead:operator_cost", "Measure the host time of the fold operators."),
    "offline": ("offline:command", "Compile the generated kernels for GPUs that need not be there."),
    "docs": ("tables:fill_documents", "Fill the tables of Markdown files from the CSVs that they name."),
    "gpu-check": ("gpu_check:main", "Check and measure everything that needs a GPU."),
}
"""The function of each command, in perf/, and its help. It is imported when the command runs."""


def _register(name: str, function: str, description: str) -> None:
    @dev.command(
        name,
        help=description,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def run_function(context: typer.Context) -> None:
        module, _, attribute = function.partition(":")
        found = getattr(importlib.import_module(f"triton_convbn.perf.{module}"), attribute)
        command = f"triton-convbn dev {name}"
        if name == "gpu-check":  # parses its arguments itself, as it runs where typer is missing
            raise typer.Exit(found(context.args, command))
        own = typer.Typer(add_completion=False)
        own.command()(found)
        raise typer.Exit(own(args=context.args, prog_name=command, standalone_mode=False) or 0)


for _name, (_function, _description) in DEVELOPER.items():
    _register(_name, _function, _description)


@app.command()
def explain(
    model: Model,
    size: Size = None,
    shape: Shapes = None,
    when: WhenOption = "profitable",
    infer: Annotated[bool, typer.Option("--infer", help="Explain inference instead of training.")] = False,
    json_: Json = False,
) -> None:
    """List the convolution that each BatchNorm of a model folds into, or why it is not folded."""
    options = Options.of(when=when)
    import torch

    from .example_inputs import check
    from .explanation import explain as explain_model
    from .inductor import patched
    from .models import load_with_inputs

    with errors.status(f"tracing {model}"):
        loaded, inputs = load_with_inputs(model, shape, size=size)
        check(model, loaded, inputs)
        with patched(when=options.when), torch.set_grad_enabled(not infer):
            explanation = explain_model(loaded, *inputs.args, **inputs.kwargs)
    if json_:
        rows = explanation.to_frame().to_dict("records")
        found = {"model": model, "folded": explanation.folded, "batch_norms": explanation.calls, "rows": rows}
        print(json.dumps(found | {"unmerged": [asdict(each) for each in explanation.unmerged]}))
        return
    frame = explanation.to_frame()[["batch_norm", "conv", "reason", "detail"]]
    frame = frame.set_axis(["BatchNorm", "folds into", "or stays", "detail"], axis=1)
    print_table(frame if any(frame["detail"]) else frame.drop(columns="detail"), model)
    for each in explanation.unmerged:
        print(f"{each.sum}: the sum is not merged: {each.reason}" + (f" ({each.detail})" if each.detail else ""))
    reasons = {(row.reason, row.why) for row in explanation.rows if row.reason}
    for reason, why in sorted(reasons | {(each.reason, each.why) for each in explanation.unmerged}):
        print(f"{reason}: {why}")
    print(f"{explanation.folded} of {explanation.calls} fold")


@app.command()
def kernel(
    model: Model,
    arch: Annotated[str, typer.Option("--arch", help="Architecture for --facts, such as sm_90 or gfx942.")] = "sm_90",
    facts: Annotated[
        bool, typer.Option("--facts", help="Compile offline and print registers, spills and more.")
    ] = False,
    size: Size = None,
    shape: Shapes = None,
    pairs_per_launch: PairsPerLaunch = 16,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for each kernel.")] = False,
) -> None:
    """Print the Triton kernels that the pass launches for a model, or facts of the compiled ones. Needs no GPU."""
    from .dispatch import has_triton
    from .example_inputs import check
    from .kernel_view import kernels_of_named
    from .kernels.offline import ARCHS
    from .kernels.offline import facts as compile_offline
    from .models import load_with_inputs

    options = Options.of(pairs_per_launch=pairs_per_launch)
    if arch not in ARCHS:
        raise UsageError(f"no such architecture: {arch}; choose one of {', '.join(ARCHS)}")
    if facts and not has_triton():
        raise UsageError("--facts needs triton: pip install triton")
    with errors.status(f"tracing {model}"):
        loaded, inputs = load_with_inputs(model, shape, size=size)
        check(model, loaded, inputs)
        views = kernels_of_named(model, loaded, inputs, options)
    if not facts:
        for view in views:
            print(json.dumps(_head(view) | {"text": view.source.text}) if json_ else view.source.text)
        return
    import pandas

    shown = ["registers", "spills", "load_bits", "store_bits", "parameter_bytes", "instructions", "compile_seconds"]
    rows = []
    for view in views:
        with errors.status(f"compiling {view.source.name} for {arch}"):
            found = asdict(compile_offline(view.source, arch))
        if json_:
            print(json.dumps(_head(view) | found), flush=True)
        rows.append(_head(view) | {"pairs": len(view.pairs)} | {name: found[name] for name in shown})
    if not json_:
        frame = pandas.DataFrame(rows, columns=["kernel", "direction", "pairs", *shown])
        print_table(frame.rename(columns=lambda name: name.replace("_", " ")), f"{model}, compiled offline for {arch}")


def _head(view: Any) -> dict[str, Any]:
    return {"kernel": view.source.name, "direction": view.direction, "pairs": list(view.pairs)}


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python script; what follows it are its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")] = False,
    kernel: Annotated[
        Kernel, typer.Option("--kernel", help="Fold with torch, with Triton kernels, or with these where they can run.")
    ] = "auto",
    recompute: Recompute = True,
    recompute_activations: Annotated[
        bool, typer.Option(help="Let backward compute activations again, so that each layer keeps one tensor.")
    ] = True,
    pairs_per_launch: PairsPerLaunch = 16,
    when: WhenOption = "profitable",
    on_decline: Annotated[
        OnDecline, typer.Option("--on-decline", help="What to do about a BatchNorm that is not folded.")
    ] = "ignore",
) -> Callable[[], object]:
    """Run an unmodified script or module with the pass patched into Inductor."""
    # `main` calls what this returns, so that an error of the script is not taken for one of this command.
    options: dict[str, Any] = {
        "kernel": kernel,
        "recompute": recompute,
        "recompute_activations": recompute_activations,
        "pairs_per_launch": pairs_per_launch,
        "when": when,
        "on_decline": on_decline,
    }
    Options.of(**options)  # a wrong value is an error before torch is imported
    if script.startswith("-"):
        raise UsageError(f"no such option: {script} (what follows the script goes to the script)")
    if module:
        _first_on_path(os.getcwd())  # as for python -m
        _check_module(script)
    elif not Path(script).is_file():
        raise UsageError(f"no such script: {script}")
    from .inductor import patch

    patch(**options)
    sys.argv = [script, *context.args]
    if module:
        return partial(runpy.run_module, script, run_name="__main__", alter_sys=True)
    _first_on_path(str(Path(script).resolve().parent))
    return partial(runpy.run_path, script, run_name="__main__")


def _first_on_path(folder: str) -> None:
    """Put a folder in place of this command's own on the path of imports. In Python's safe mode there is none."""
    sys.path[: 0 if sys.flags.safe_path else 1] = [folder]


def _check_module(name: str) -> None:
    """Raise UsageError if `python -m` cannot run the module."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:  # a parent is missing, or the name is relative
        raise UsageError(f"no such module: {name} ({error})") from error
    if spec is None:
        raise UsageError(f"no such module: {name}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for bad input, 130 after Ctrl-C.

    1: a figure of `bench` or a check has failed, `bench --compare` found a regression, `tune` could win nothing or
    write no winner, or `dev docs --check` found an outdated table.
    """
    try:
        code: Any = app(args=arguments, standalone_mode=False)
    except (UsageError, OptionError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # The errors of the parser. Their class moved between releases of typer; that they format a message did not.
        if hasattr(error, "format_message"):
            _fail(error.format_message())
        if type(error).__name__ == "Abort":
            sys.exit(130)
        raise
    if callable(code):
        code()
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    if message:  # the parser's is empty where it has printed the help instead
        errors.print(f"triton-convbn: {' '.join(message.split())}", markup=False, soft_wrap=True)
    sys.exit(2)
