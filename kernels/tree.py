"""The branch tree of a generated kernel: which programs run which body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .spec import GradSpec, PairSpec

Names = Mapping[str, str]


@dataclass(frozen=True)
class Leaf:
    """One pair of the tree: its number and spec, how many programs it takes, the names of its arguments by field, the
    text of its body at a given indent for arguments of given names, and what a program does, see `generate.Work`."""

    pair: int
    spec: PairSpec | GradSpec
    programs: int
    names: Names
    body: Callable[[int, Names], str]
    passes: int
    bytes_at_once: int


@dataclass(frozen=True)
class Branch:
    """What a branch tree leads to: how many programs it takes, and its text from a first program at an indent."""

    programs: int
    text: Callable[[int, int], str]


def tree(branches: Sequence[Branch], first: int, indent: int) -> str:
    """A balanced tree of branches on `pid`; the first one starts at program `first`."""
    pad = " " * indent
    if len(branches) == 1:
        return branches[0].text(first, indent)
    half = len(branches) // 2
    middle = first + sum(branch.programs for branch in branches[:half])
    return (
        f"{pad}if pid < {middle}:\n"
        + tree(branches[:half], first, indent + 4)
        + f"{pad}else:\n"
        + tree(branches[half:], middle, indent + 4)
    )


def _block(first: int, indent: int) -> str:
    return f"{' ' * indent}block = pid{f' - {first}' if first else ''}\n"


def _own_body(leaf: Leaf) -> Branch:
    """The body of one pair, on its own arguments."""
    comment = f"# pair {leaf.pair}: {leaf.spec.describe()}\n"

    def text(first: int, indent: int) -> str:
        return _block(first, indent) + f"{' ' * indent}{comment}" + leaf.body(indent, leaf.names)

    return Branch(leaf.programs, text)


def _shared_body(leaves: Sequence[Leaf]) -> Branch:
    """One body for pairs of equal specs: a tree selects the arguments, then comes what all of them run."""

    def selected(leaf: Leaf) -> Branch:
        def text(first: int, indent: int) -> str:
            pad = " " * indent
            return _block(first, indent) + "".join(f"{pad}{field} = {value}\n" for field, value in leaf.names.items())

        return Branch(leaf.programs, text)

    def text(first: int, indent: int) -> str:
        pairs = ", ".join(str(leaf.pair) for leaf in leaves)
        one = leaves[0]
        return (
            f"{' ' * indent}# pairs {pairs}: {one.spec.describe()}\n"
            + tree(list(map(selected, leaves)), first, indent)
            + one.body(indent, {field: field for field in one.names})
        )

    return Branch(sum(leaf.programs for leaf in leaves), text)


def branches_of(leaves: Sequence[Leaf], emit: str) -> list[Branch]:
    """One for each pair, or for all pairs of one spec, in the order of their first."""
    if emit == "tree":
        return list(map(_own_body, leaves))
    alike: dict[PairSpec | GradSpec, list[Leaf]] = {}
    for leaf in leaves:
        alike.setdefault(leaf.spec, []).append(leaf)
    return [_own_body(same[0]) if len(same) == 1 else _shared_body(same) for same in alike.values()]
