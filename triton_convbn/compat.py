"""Bridge the differences between torch 2.11 and 2.14.

Before 2.13 a hook of Inductor's configuration takes one pass, not a list, and does not tell it whether the graph is for
inference.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass, get_custom_graph_passes

    def hook_value(passes: Sequence[Any]) -> Any:
        return list(passes) or None

except ImportError:
    CustomInferenceAwareGraphPass = CustomGraphPass  # type: ignore[misc,assignment]

    class _Sequence(CustomGraphPass):
        """Run several passes as one."""

        def __init__(self, passes: Sequence[Any]) -> None:
            self.passes = tuple(passes)

        def __call__(self, graph: fx.Graph) -> None:
            for each in self.passes:
                each(graph)

        def uuid(self) -> Any:
            found = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
            return None if None in found else tuple(found)

        def __deepcopy__(self, memo: dict[int, Any]) -> "_Sequence":
            return self

    def get_custom_graph_passes(custom_pass: Any) -> tuple[Any, ...]:  # type: ignore[misc]
        if custom_pass is None:
            return ()
        return custom_pass.passes if isinstance(custom_pass, _Sequence) else (custom_pass,)

    def hook_value(passes: Sequence[Any]) -> Any:
        return _Sequence(passes) if len(passes) > 1 else passes[0] if passes else None


__all__ = ["CustomGraphPass", "CustomInferenceAwareGraphPass", "get_custom_graph_passes", "hook_value"]
