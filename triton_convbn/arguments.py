"""Options that several commands share."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="A torchvision or timm name, or package.module:callable.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Height and width of the input; default: the model's.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="N,C,...", help="An input, such as 1,1,16,16 or 2,9:int64. One for each argument."),
]
PairsPerLaunch = Annotated[int, typer.Option("--pairs-per-launch", help="Most pairs that one kernel launch folds.")]
