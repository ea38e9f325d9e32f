"""How Inductor comes to run the pass: patched in for everything, or as a backend of one torch.compile.

Only the graph before autograd still has convolutions and BatchNorms; afterwards BatchNorm is decomposed. The hook for
that graph is ``torch._inductor.config.pre_grad_custom_pass``, which other people use too: theirs stay.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from torch import Tensor, fx
from torch._inductor import config

from .compat import CustomGraphPass, errors_pass_dynamo, get_custom_graph_passes, hook_value, keep_shapes_when_freezing
from .graph.conv_bn_pass import ConvBNPass
from .options import OptionError, Options

_lock = threading.RLock()
_FOLD_HOOK = "pre_grad_custom_pass"
# By the hook of Inductor's configuration. Of a thread, because that configuration is: one for all of them would tell a
# thread that its passes had gone when another took its own out.
_installed: ContextVar[Mapping[str, CustomGraphPass]] = ContextVar(
    "triton_convbn installed", default=MappingProxyType({})
)
_patched_threads: WeakSet[threading.Thread] = WeakSet()


def patch(**options: Any) -> ConvBNPass:
    """Let Inductor run the pass in every compile of this thread from now on, in place of its own conv-BN pass.

    Inductor's configuration is of a thread, and so is this: a thread that compiles has to call it, too.
    Calling it again replaces the options. Custom passes that are there already stay and run first.

    Args: the keywords of `Options`; ``codegen=False`` is not for Inductor.
    Returns: the pass that is installed.
    Raises: OptionError for a bad option; nothing has changed then.
    """
    convbn = ConvBNPass(**options)
    if not convbn.options.codegen:
        raise OptionError(
            "codegen=False is for a graph that nobody compiles, and Inductor does: use"
            " torch.compile(model, backend='triton_convbn', options={'codegen': False})"
        )
    with _lock:
        keep_shapes_when_freezing()
        _install({_FOLD_HOOK: convbn})
        _patched_threads.add(threading.current_thread())
        _silence_upstream()
    return convbn


def unpatch() -> None:
    """Undo `patch`; without effect where nothing is patched. What was compiled meanwhile stays as it is."""
    with _lock:
        for hook in _installed.get():
            others = _others(hook)
            setattr(config, hook, others[0] if len(others) == 1 else hook_value(others))
        _installed.set(MappingProxyType({}))
        _patched_threads.discard(threading.current_thread())
        if not _patched_threads:
            _restore_upstream()


@contextmanager
def patched(**options: Any) -> Iterator[ConvBNPass]:
    """`patch` for the length of a ``with`` block; what was patched before it is patched again after it."""
    with _lock:
        before = dict(_installed.get())
        installed = patch(**options)
    try:
        yield installed
    finally:
        with _lock:
            if before:
                _install(before)
            else:
                unpatch()


def current_options() -> Options:
    """The options of the pass that is patched in; the default ones where none is."""
    installed = _installed.get().get(_FOLD_HOOK)
    return installed.options if isinstance(installed, ConvBNPass) else Options()


def _install(passes: dict[str, CustomGraphPass]) -> None:
    for hook, each in passes.items():
        setattr(config, hook, hook_value([*_others(hook), each]))
    _installed.set(MappingProxyType({**_installed.get(), **passes}))


def _others(hook: str) -> list[Any]:
    """The custom passes of Inductor's configuration that `patch` did not put there."""
    return [
        other for other in get_custom_graph_passes(getattr(config, hook)) if other is not _installed.get().get(hook)
    ]


def _silence_upstream() -> None:
    """Inductor's own pass runs before any custom one, and wherever its flag is on it would take the pairs, faults and
    all. Where ours is patched in, the flag is honoured by ours and the other does nothing. An attribute of the instance
    hides the method of its class as long as any thread is patched, and asks for the thread that it is called in."""
    from torch._inductor.fx_passes.pre_grad import efficient_conv_bn_eval_pass as upstream

    def apply(*arguments: Any, **keywords: Any) -> int:
        return 0 if _installed.get() else type(upstream).apply(upstream, *arguments, **keywords)

    upstream.apply = apply  # type: ignore[method-assign]


def _restore_upstream() -> None:
    from torch._inductor.fx_passes.pre_grad import efficient_conv_bn_eval_pass as upstream

    vars(upstream).pop("apply", None)


@errors_pass_dynamo(OptionError)
def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Inductor with the pass: ``torch.compile(model, backend="triton_convbn", options={"recompute": False})``.

    With ``{"codegen": False}`` no Inductor: Dynamo's graph, folded, runs in eager. No C++ compiler is needed then.

    Args:
        options: the keywords of `Options`, and any option of Inductor's own, where it generates code.
        mode: as `torch.compile` takes it, such as ``"max-autotune"``.
    """
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx

    options = dict(options or {})
    own = {field.name for field in fields(Options)}
    unknown = sorted(set(options) - own - {name.replace("-", "_") for name in list_options()})
    if unknown:
        raise OptionError(
            f"unknown option {', '.join(unknown)}; the options are {', '.join(sorted(own))}, or Inductor's"
        )
    inductors = sorted(set(options) - own) + ([f"mode={mode}"] if mode else [])
    if options.get("codegen") is False:
        if inductors:
            raise OptionError(f"codegen=False leaves Inductor out, and with it {', '.join(inductors)}")
        convbn = ConvBNPass(**options)
        for module in gm.modules():  # the bodies of checkpoints and branches are graphs of their own
            if isinstance(module, fx.GraphModule):
                convbn(module.graph)
                module.recompile()
        return gm.forward
    asked = {"when": "always"} if options.get("efficient_conv_bn_eval_fx_passes") else {}
    convbn = ConvBNPass(**asked | {name: value for name, value in options.items() if name in own})
    patches = (list_mode_options(mode) if mode else {}) | {
        name: value for name, value in options.items() if name not in own
    }
    with _lock:
        keep_shapes_when_freezing()
        others = get_custom_graph_passes(patches.get(_FOLD_HOOK)) or _others(_FOLD_HOOK)
        patches[_FOLD_HOOK] = hook_value([*others, convbn])
    patches["efficient_conv_bn_eval_fx_passes"] = False
    return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[return-value]


__all__ = ["backend", "patch", "patched", "unpatch"]
