"""Reports of a tuning run: rows of all candidates, tables of the best, and the entries of the tuned file."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import usage_error_from
from ..kernels.config import DEFAULT_CONFIG, KernelConfig
from ..kernels.files import write_atomically
from ..kernels.tuned import Gpu, choose
from ..kernels.tuned_files import BadTunedFile, Entry, files, generator_hash, read
from ..progress import print_table
from ..versions import commit
from .outcome import Status
from .run import Search
from .store import Header, Store

BEST = 3
SHOWN = [*(field.name for field in fields(KernelConfig)), "cost", "gain", "bytes", "winner", "default"]


def rows_of(searches: Sequence[Search], header: Header) -> list[dict[str, Any]]:
    """Return one row a candidate: configuration, outcome, gain over the default, facts, versions."""
    rows: list[dict[str, Any]] = []
    made_by = asdict(header) | {"commit": commit()}
    for search in searches:
        problem, winner = search.problem, search.winner if search.first is None else None
        failed = [config for config, outcome in search.outcomes.items() if outcome.status is not Status.OK]
        for config in [*search.ranked, *failed]:
            outcome = search.outcomes[config]
            row = {"problem": problem.key, "key": problem.tuned_key, "pairs": len(problem.specs)}
            row |= {"elements": problem.elements, **asdict(config)}
            row |= {"status": str(outcome.status), "cost": outcome.cost, "unit": header.unit}
            row |= {"gain": search.gain(config), "default": config == DEFAULT_CONFIG, "winner": config == winner}
            row |= {**outcome.facts, "message": outcome.message, "seconds": outcome.seconds, "how": header.how}
            rows.append(row | made_by)
    return rows


def summary(search: Search) -> dict[str, Any]:
    """Return the course of a search and its winner, for --json."""
    problem, winner = search.problem, search.winner
    failed = sorted(str(outcome.status) for outcome in search.outcomes.values() if outcome.status is not Status.OK)
    found: dict[str, Any] = {"problem": problem.key, "key": problem.tuned_key, "describe": problem.describe()}
    found |= {"space": len(search.space), "tried": len(search.outcomes), "checks": search.first is not None}
    found |= {name: getattr(search, name) for name in ("evaluated", "from_store", "ended", "overruled")}
    found |= {"winner": winner and asdict(winner), "cost": search.cost(winner), "gain": search.gain(winner)}
    return found | {"default_cost": search.cost(DEFAULT_CONFIG), "failures": Counter(failed)}


def entries_of(searches: Sequence[Search], header: Header) -> list[Entry]:
    """Return the entries of the tuned file: one for each key with a winner."""
    about = {name: getattr(header, name) for name in ("how", "device", "unit", "torch", "triton")}
    entries = []
    for search in searches:
        if search.winner and search.first is None:
            course = summary(search)
            found = {name: course[name] for name in ("key", "tried", "cost", "default_cost")}
            found |= {"problem": course["describe"], "sources": generator_hash()}
            entries.append(Entry(config=search.winner, **found, **about))
    return entries


def output(searches: Sequence[Search], store: Store, csv: Path | None, json_: bool, more: Mapping[str, object]) -> None:
    """Write the CSV, and print tables or one JSON object with `more` in it. Raise UsageError for the CSV."""
    import pandas as pd

    rows, header = rows_of(searches, store.header), store.header
    frame = pd.DataFrame(rows).convert_dtypes()
    if csv is not None:
        with usage_error_from(f"--csv {csv}"):
            csv.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(csv, frame.to_csv(index=False).encode(), mode=0o644)
    evaluated, from_store = sum(each.evaluated for each in searches), sum(each.from_store for each in searches)
    if json_:
        found = {**more, "device": header.device or header.arch, "how": header.how, "csv": csv and str(csv)}
        found |= {"evaluated": evaluated, "from_store": from_store, "unreadable_lines": store.unreadable}
        print(json.dumps(found | {"problems": list(map(summary, searches)), "rows": rows}, allow_nan=False))
        return
    if not rows:
        print("no candidate was tried: the budget was over")
    for search in searches if rows else ():
        mine = frame[frame["problem"] == search.problem.key]
        if search.first is None:
            able = mine[mine["status"] == "ok"]
            shown = able[able.index.isin(able.index[:BEST]) | able["winner"] | able["default"]]
            where = f"{header.device or header.arch}, {header.how}; {len(mine)} of {len(search.space)} tried"
            table = shown.reindex(columns=SHOWN).round(3).rename(columns={"cost": header.unit})
            print_table(table, f"{search.problem.describe()}\n{where}")
        for status, failed in mine[mine["status"] != "ok"].groupby("status"):
            print(f"{len(failed)} {status}: {failed['message'].iloc[0][:200]}")
        if search.overruled:
            print(f"the default stays: {search.overruled}")
        if search.winner is None and search.first is None:
            print("nothing can win: the default stays in force")
        if not search.ended:
            full = len(search.outcomes) >= (search.preset.configs or math.inf)
            print("--max-configs are tried" if full else "the budget ran out: run the same command again to resume")
    if store.unreadable:
        print(f"{store.unreadable} lines of the store could not be read")
    print(f"{evaluated} candidates evaluated, {from_store} known from the store; costs: {header.how}")


def output_choices(keys: set[str], gpu: Gpu, json_: bool) -> None:
    """Print the configuration in force for keys and those of the tuned files: its file, why, what was passed over."""
    looked = [path for _, path in files(gpu.arch)]
    for path in looked:
        with suppress(OSError, BadTunedFile):  # the lookup itself warns
            keys |= {entry.key for entry in read(path)}
    choices = [choose(key, gpu) for key in sorted(keys)]
    rows = [asdict(choice) | {"file": choice.file and str(choice.file)} for choice in choices]
    where = gpu.name or gpu.arch
    if json_:
        print(json.dumps({"device": where, "files": list(map(str, looked)), "rows": rows}))
    elif not choices:
        names = " and ".join(map(str, looked))
        print(f"nothing is tuned for {where}, every call runs with the default; looked in {names}")
    else:
        import pandas as pd

        frame = pd.DataFrame(rows).assign(configuration=[choice.config.describe() for choice in choices])
        print_table(frame[["key", "configuration", "why", "file"]], f"in force on {where}")
        for choice in choices:
            for words in choice.passed_over:
                print(f"{choice.key}: passed over {words}")
