"""Install the pass in Inductor: for all compiles of a thread, or as a backend of one `torch.compile`.

The pass needs the graph before autograd, because AOTAutograd decomposes BatchNorm. Its hook is
``torch._inductor.config.pre_grad_custom_pass``. Passes that others have put there stay.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any
from weakref import WeakSet

from torch import Tensor, fx
from torch._inductor import config

from .compat import errors_pass_dynamo, get_custom_graph_passes, hook_value, keep_shapes_when_freezing
from .graph.conv_bn_pass import ConvBNPass
from .options import Kernel, OnDecline, OptionError, Options, When, names

_HOOK = "pre_grad_custom_pass"
_lock = threading.RLock()
# Thread-local, like Inductor's configuration.
_installed: ContextVar[ConvBNPass | None] = ContextVar("triton_convbn installed", default=None)
_patched_threads: WeakSet[threading.Thread] = WeakSet()


def patch(
    *,
    kernel: Kernel = "auto",
    recompute: bool = True,
    recompute_activations: bool = True,
    pairs_per_launch: int = 16,
    when: When = "profitable",
    on_decline: OnDecline = "ignore",
) -> ConvBNPass:
    """Run the pass in all later compiles of this thread, instead of Inductor's own conv-BN pass.

    Thread-local, like Inductor's configuration: call it in every thread that compiles. A second call replaces the
    options. Other custom passes stay and run first.

    Args:
        kernel, recompute, recompute_activations, pairs_per_launch, when, on_decline: see `Options`.

    Returns:
        The installed pass.

    Raises:
        OptionError: an option has a wrong value. Nothing is installed then.
    """
    convbn = ConvBNPass(
        kernel=kernel,
        recompute=recompute,
        recompute_activations=recompute_activations,
        pairs_per_launch=pairs_per_launch,
        when=when,
        on_decline=on_decline,
    )
    with _lock:
        keep_shapes_when_freezing()
        _install(convbn)
        _patched_threads.add(threading.current_thread())
        _disable_upstream()
    return convbn


def unpatch() -> None:
    """Undo `patch`. Has no effect if nothing is patched. Models that are compiled already do not change."""
    with _lock:
        if _installed.get() is not None:
            others = _other_passes()
            setattr(config, _HOOK, others[0] if len(others) == 1 else hook_value(others))
        _installed.set(None)
        _patched_threads.discard(threading.current_thread())
        if not _patched_threads:
            _enable_upstream()


@contextmanager
def patched(
    *,
    kernel: Kernel = "auto",
    recompute: bool = True,
    recompute_activations: bool = True,
    pairs_per_launch: int = 16,
    when: When = "profitable",
    on_decline: OnDecline = "ignore",
) -> Iterator[ConvBNPass]:
    """Call `patch` for the length of a ``with`` block, and restore afterwards what was patched before.

    Args:
        kernel, recompute, recompute_activations, pairs_per_launch, when, on_decline: see `Options`.

    Raises:
        OptionError: an option has a wrong value.
    """
    with _lock:
        before = _installed.get()
        installed = patch(
            kernel=kernel,
            recompute=recompute,
            recompute_activations=recompute_activations,
            pairs_per_launch=pairs_per_launch,
            when=when,
            on_decline=on_decline,
        )
    try:
        yield installed
    finally:
        with _lock:
            if before is not None:
                _install(before)
            else:
                unpatch()


def current_options() -> Options:
    """Return the options of the pass that is patched in, or the defaults."""
    installed = _installed.get()
    return Options() if installed is None else installed.options


def _install(convbn: ConvBNPass) -> None:
    setattr(config, _HOOK, hook_value([*_other_passes(), convbn]))
    _installed.set(convbn)


def _other_passes() -> list[Any]:
    """Return the custom passes of Inductor's configuration that `patch` did not install."""
    return [other for other in get_custom_graph_passes(getattr(config, _HOOK)) if other is not _installed.get()]


def _disable_upstream() -> None:
    """Let Inductor's own pass do nothing in threads that are patched.

    It runs before custom passes and would take the pairs if its flag is on. Our pass honours the flag instead. An
    attribute of the instance hides the method of its class.
    """
    from torch._inductor.fx_passes.pre_grad import efficient_conv_bn_eval_pass as upstream

    def apply(*arguments: Any, **keywords: Any) -> int:
        return 0 if _installed.get() is not None else type(upstream).apply(upstream, *arguments, **keywords)

    upstream.apply = apply  # type: ignore[method-assign]


def _enable_upstream() -> None:
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
    """Compile with Inductor and the pass: ``torch.compile(model, backend="triton_convbn")``.

    Args:
        gm: The graph that Dynamo has captured.
        example_inputs: Its inputs, fake.
        options: Options of the pass, see `Options`, and of Inductor: ``options={"recompute": False}``.
        mode: As for `torch.compile`, ``"max-autotune"`` for example.

    Raises:
        OptionError: an option is unknown or has a wrong value.
        DeclinedError: a BatchNorm cannot be folded, with ``on_decline="raise"``.
    """
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx

    options = dict(options or {})
    own = {name: value for name, value in options.items() if name in names()}
    unknown = sorted(set(options) - set(own) - {name.replace("-", "_") for name in list_options()})
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; the options are {', '.join(names())}, or Inductor's")
    asked = {"when": "always"} if options.get("efficient_conv_bn_eval_fx_passes") else {}
    convbn = ConvBNPass(**asked | own)
    if not convbn.options.codegen:
        raise OptionError("triton_convbn generates code: use backend='triton_convbn_eager' for codegen=False")
    patches = (list_mode_options(mode) if mode else {}) | {
        name: value for name, value in options.items() if name not in own
    }
    with _lock:
        keep_shapes_when_freezing()
        others = get_custom_graph_passes(patches.get(_HOOK)) or _other_passes()
        patches[_HOOK] = hook_value([*others, convbn])
    patches["efficient_conv_bn_eval_fx_passes"] = False
    return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[return-value]


@errors_pass_dynamo(OptionError)
def eager_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Fold Dynamo's graph and run it in eager mode: ``torch.compile(model, backend="triton_convbn_eager")``.

    It saves as little memory for backward as the other backend, and needs no C++ compiler.

    Args:
        gm: The graph that Dynamo has captured.
        example_inputs: Its inputs, fake.
        options: Options of the pass, see `Options`.
        mode: Not supported. `torch.compile` passes it on.

    Raises:
        OptionError: an option is unknown or has a wrong value, or is one of Inductor's.
        DeclinedError: a BatchNorm cannot be folded, with ``on_decline="raise"``.
    """
    from torch._inductor import list_options

    options = dict(options or {})
    inductors = sorted(set(options) & {name.replace("-", "_") for name in list_options()})
    inductors += [f"mode={mode}"] if mode else []
    if inductors:
        raise OptionError(f"triton_convbn_eager does not use Inductor and has no option {', '.join(inductors)}")
    convbn = ConvBNPass(**asdict(Options.of(**{"codegen": False} | options)))
    if convbn.options.codegen:
        raise OptionError("triton_convbn_eager generates no code: use backend='triton_convbn' for codegen=True")
    for module in gm.modules():  # checkpoints and branches have graphs of their own
        if isinstance(module, fx.GraphModule):
            convbn(module.graph)
            module.recompile()
    return gm.forward


__all__ = ["backend", "eager_backend", "patch", "patched", "unpatch"]
