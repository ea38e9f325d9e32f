"""The pass on an fx.Graph: select the pairs, count them, replace them."""

import logging
import warnings
from dataclasses import asdict
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..compat import errors_pass_dynamo
from ..compile_context import compiling
from ..counters import count, log_cache_hits
from ..dispatch import has_triton, interpreting
from ..fingerprint import sources
from ..options import Kernel, OnDecline, OptionError, Options, When
from ..post_grad.install import install
from .activations import save_activation_inputs
from .channels_last import run_channels_last
from .findings import Decline, Findings, norms_of
from .layers import mark_layers
from .one_thread import call_onednn
from .profitability import select
from .reasons import Reason
from .rewrite import replace

log = logging.getLogger(__name__)


class DeclinedError(RuntimeError):
    """A BatchNorm cannot be folded, with ``on_decline="raise"``. The graph is unchanged."""


class DeclinedWarning(UserWarning):
    """A BatchNorm cannot be folded, with ``on_decline="warn"``."""


class ConvBNPass(CustomGraphPass):
    """Fold every eval-mode BatchNorm of a graph into the convolution before or after it, if that is exact.

    Args:
        kernel, recompute, recompute_activations, pairs_per_launch, when, on_decline, codegen: see `Options`.

    Raises:
        OptionError: an option has a wrong value.
        TypeError: raised by a call with anything but a graph.
        DeclinedError: raised by a call, with ``on_decline="raise"``.

    Example:
        As a pass of Inductor::

            torch.compile(model, options={"pre_grad_custom_pass": ConvBNPass()})

        On a graph by hand, which is edited in place::

            ConvBNPass(codegen=False)(gm.graph)
            gm.recompile()
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "auto",
        recompute: bool = True,
        recompute_activations: bool = True,
        pairs_per_launch: int = 16,
        when: When = "profitable",
        on_decline: OnDecline = "ignore",
        codegen: bool = True,
    ) -> None:
        self.options = Options(
            kernel=kernel,
            recompute=recompute,
            recompute_activations=recompute_activations,
            pairs_per_launch=pairs_per_launch,
            when=when,
            on_decline=on_decline,
            codegen=codegen,
        )

    def __call__(self, graph: fx.Graph) -> None:
        if not isinstance(graph, fx.Graph):
            raise TypeError(f"ConvBNPass edits an fx.Graph, not a {type(graph).__name__}: give it gm.graph")
        with errors_pass_dynamo(DeclinedError, OptionError):
            self._fold(graph)

    def _fold(self, graph: fx.Graph) -> None:
        findings = select(graph, self.options)
        report(findings.declines, self.options)
        replace(  # raises before it changes anything
            graph,
            findings.pairs,
            self.options,
            mutations=findings.mutations,
            sums=findings.sums,
            input_norms=findings.input_norms,
        )
        if findings.changes_graph:
            call_onednn(graph, self.options)
        if self.options.codegen and compiling():
            marked = self.options.recompute_activations and mark_layers(graph, findings, self.options)
            if findings.changes_graph or marked:
                install()
        if not self.options.codegen and findings.changes_graph:
            if self.options.recompute:  # else the graph is to run elsewhere
                run_channels_last(graph)
            if self.options.recompute_activations:
                save_activation_inputs(graph)
        count_folds(findings)
        counts = len(norms_of(findings.pairs)), len(findings.input_norms), len(findings.sums), len(findings.declines)
        log.debug("folded %d, forward %d, merged %d, declined %d", *counts)

    def uuid(self) -> str:
        """Return the key of Inductor's caches: the sources, the options, and the versions."""
        log_cache_hits()  # if the graph comes from a cache, no other method of this pass is called
        return f"triton_convbn:{sources()}:{has_triton()}:{interpreting()}:{sorted(asdict(self.options).items())}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConvBNPass":
        return self  # it never changes, and Inductor copies its configuration, this pass in it, for every compile

    def __repr__(self) -> str:
        return f"ConvBNPass({', '.join(f'{name}={value!r}' for name, value in asdict(self.options).items())})"


def report(declines: list[Decline], options: Options) -> None:
    """Count the declines, and warn or raise as `on_decline` asks."""
    for decline in declines:
        count(f"declined:{decline.reason.value}")
        log.debug("declined %s", decline)
    declines = [decline for decline in declines if decline.reason is not Reason.DOES_NOT_PAY]  # it could fold
    if not declines or options.on_decline == "ignore":
        return
    message = "BatchNorm left alone: " + "; ".join(map(str, declines))
    if options.on_decline == "raise":
        raise DeclinedError(message)
    warnings.warn(message, DeclinedWarning, stacklevel=3)


def count_folds(findings: Findings) -> None:
    """Count the BatchNorms that fold, the sums that merge, and the sums that do not, each with its reason."""
    norms = [bn.node for bn in norms_of(findings.pairs)]
    norms += [bn.node for branch in findings.sums for bn in branch.norms]
    norms += [norm.bn.node for norm in findings.input_norms]
    for _ in norms:
        count("efficient_conv_bn_eval", "inductor")
        count("folded")
    for _ in findings.input_norms:
        count("folded_forward")
    for _ in findings.sums:
        count("merged")
    for decline in findings.sum_declines:
        count(f"not_merged:{decline.reason.value}")
        log.debug("not merged %s", decline)
