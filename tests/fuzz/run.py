"""The long fuzz: python tests/fuzz/run.py [--examples 10000] [--seed N]

Prints how many examples it ran, how many pairs they folded, the declines by reason, and the seconds. The exit code is 1
where the property does not hold; the smallest example that breaks it is printed as Python, for `regressions.py`.
"""

import sys
import time
import warnings
from collections import Counter
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from property import Invalid, check
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from strategies import examples


def fuzz(count: int, seed: int, step: Any = lambda: None) -> tuple[Counter[str], str | None]:
    """Counts of what was run and seen, and the smallest example that failed, if one did."""
    seen: Counter[str] = Counter()
    failed: list[str] = []

    @seeded(seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(examples())
    def once(example: Any) -> None:
        program, dialect, host, options = example
        seen["examples"] += 1
        step()
        try:
            seen["examples that fold"] += bool(check(program, dialect, host, seen, **options))
        except Invalid:
            seen["examples that say nothing"] += 1
        except Exception as error:
            failed[:] = [f"{program}\n{dialect}, {host}, {options}\n{type(error).__name__}: {error}"]
            raise

    try:
        once()
    except Exception as error:  # of an example, or hypothesis's own
        return seen, failed[-1] if failed else f"{type(error).__name__}: {error}"
    return seen, None


def main(
    count: Annotated[int, typer.Option("--examples", min=1, help="How many examples are drawn.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the examples; 0 draws one.")] = 0,
) -> None:
    """Check the property over many random programs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed = seed or time.time_ns() % 2**32
    print(f"seed {seed}", flush=True)
    start = time.perf_counter()
    cpu = time.process_time()
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=count)
        seen, failed = fuzz(count, seed, lambda: bar.update(task, advance=1))
    seconds = time.perf_counter() - start
    for name, number in seen.most_common():
        print(f"{number:8,} {name}")
    print(f"{seen['examples']:,} examples in {seconds:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    if failed is not None:
        print(f"The property does not hold:\n{failed}")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
