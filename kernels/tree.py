"""Generate the branch tree of a kernel, which assigns programs to bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .merge_spec import MergeGradSpec, MergeSpec
from .spec import GradSpec, PairSpec

Names = Mapping[str, str]


@dataclass(frozen=True)
class Leaf:
    """One pair of the tree, or one sum.

    Attributes:
        pair, spec: Its index in the group, and its spec.
        programs: The number of its programs.
        names: The names of its arguments, by field.
        body: Returns the text of its body, given an indent and the names of the arguments.
        passes, bytes_at_once: See `Work`.
    """

    pair: int
    spec: PairSpec | GradSpec | MergeSpec | MergeGradSpec
    programs: int
    names: Names
    body: Callable[[int, Names], str]
    passes: int
    bytes_at_once: int


@dataclass(frozen=True)
class Branch:
    """A body and its number of programs. `text` returns the body, given its first program and an indent."""

    programs: int
    text: Callable[[int, int], str]


def tree(branches: Sequence[Branch], first: int, indent: int) -> str:
    """Return a balanced tree of branches on `pid`, whose first program is `first`."""
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
    """Return the branch of one pair."""
    what = "sum" if isinstance(leaf.spec, MergeSpec | MergeGradSpec) else "pair"
    comment = f"# {what} {leaf.pair}: {leaf.spec.describe()}\n"

    def text(first: int, indent: int) -> str:
        return _block(first, indent) + f"{' ' * indent}{comment}" + leaf.body(indent, leaf.names)

    return Branch(leaf.programs, text)


def _shared_body(leaves: Sequence[Leaf]) -> Branch:
    """Return one branch for pairs with equal specs: a tree selects the arguments, then one body follows."""

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
    """Return a branch for each pair, or with emit="shared" for each distinct spec, ordered by its first pair."""
    if emit == "tree":
        return list(map(_own_body, leaves))
    alike: dict[object, list[Leaf]] = {}
    for leaf in leaves:
        alike.setdefault(leaf.spec, []).append(leaf)
    return [_own_body(same[0]) if len(same) == 1 else _shared_body(same) for same in alike.values()]
