"""A decoder's layers compiled by `torch.compile`: what is elementwise, in few passes over memory.

Norms, rotary embeddings, activations and the residual stream are some thirty operators a layer, and
each reads and writes all of a stream. On a GPU, whose products are fast, that takes a third of the
time, on a CPU a tenth. Compiled, they are a handful of kernels; products stay the libraries' own.
Attention (`rayreward.attention`) stands among them as an operator, so that layers can be one graph:
between two of them the interpreter takes longer than a GPU does for a small one.

The last layer stays as it is: within it the stream is narrowed (`rayreward.narrowing`).
Kernels are chosen without measuring, so that every actor of a kind has the same ones (G2).

For decoders only: an encoder pools by a mode of torch's (`rayreward.flat`) that the compiler would
take for a part of each layer.

Knows torch's and transformers' modules; does not know what a stream is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_not
from typing import Any, Literal

import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rayreward.operators import compile_operators
from rayreward.rotary import LeaveToAttention

Fused = Literal["together", "one by one"]
"""How layers are compiled: as one graph, or each as its own."""

_OPTIONS: dict[str, Any] = {"deterministic": True}
"""Of Inductor: no reduction is summed in an order that a measurement chose."""

_ON_CPU = _OPTIONS | {
    "cpp.dynamic_threads": True,
    "size_asserts": False,
    "alignment_asserts": False,
    "post_grad_custom_pre_pass": LeaveToAttention(),
}
"""Kernels run on as many threads as their caller has, not on as many as there were when they were
compiled. How tensors lie is not looked at again in each call: a trial has."""


_SMALL = 2**25
"""Weights of a layer for which a GPU takes no longer than the interpreter: an H100 computes 16,384
tokens in 1 ms with half as many, in 4 ms with twice as many, where nothing is gained. To compile
layers together takes 15 s more."""


def gains_together(module: PreTrainedModel) -> bool:
    """Whether layers are faster as one graph: on a CPU all are, on a GPU small ones."""
    weights = max(
        (sum(p.numel() for p in layer.parameters()) for layer in _layers(module)), default=0
    )
    return module.device.type == "cpu" or weights < _SMALL


def fuse_layers(module: PreTrainedModel, *, together: bool = False) -> bool:
    """Compiles all repeated layers but the last, at the first pass that follows.

    Numbers of tokens are left open: that pass compiles for all of them.

    Args:
        module: Whose layers are compiled.
        together: All of them as one graph (`_Chain`), not each as its own. Attention has to be an
            operator of it.

    Returns:
        Whether there is anything to compile.
    """
    layers = _layers(module)[:-1]
    options = _OPTIONS
    if module.device.type == "cpu":
        compile_operators()
        options = _ON_CPU
    if together:
        for layer, call in zip(layers, _Chain(layers, options).calls, strict=True):
            layer._compiled_call_impl = call
    else:
        for layer in layers:
            layer.compile(dynamic=True, options=options)
    return bool(layers)


@torch.compiler.nested_compile_region
def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs a layer, in a graph that all layers of its kind share."""
    return layer.forward(*args, **kwargs)


class _Chain:
    """Layers that a model calls one after the other, each with what the one before it returned.

    Between two of them the interpreter takes half a millisecond, in which only one thread of a CPU
    works, and a GPU waits. So all calls but the last one return what they are given, and the last
    one runs all layers.
    """

    def __init__(self, layers: Sequence[nn.Module], options: dict[str, Any]) -> None:
        def run(hidden: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
            for layer in layers:
                hidden = _run(layer, hidden, *args, **kwargs)
            return hidden

        self._run = torch.compile(run, dynamic=False, options=options)
        self._given: list[Any] = []
        ends = len(layers) - 1
        self.calls = [partial(self._call, at == 0, at == ends) for at in range(len(layers))]
        """What stands in for the call of each layer."""

    def _call(
        self, first: bool, last: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        given = [hidden, *args, *kwargs, *kwargs.values()]
        if first:
            self._given = given
        elif len(given) != len(self._given) or any(map(is_not, given, self._given)):
            raise ValueError("layers are given different things")
        if not last:
            return hidden
        self._given = []
        for tensor in tree_leaves((hidden, args, kwargs)):
            _leave_open(tensor, hidden.shape[1])
        return self._run(hidden, args, kwargs)


def _leave_open(value: Any, tokens: int) -> None:
    """Has a graph compiled for all numbers of tokens."""
    if isinstance(value, torch.Tensor):
        for dimension in (0, 1):
            if value.shape[dimension : dimension + 1] == (tokens,):
                torch._dynamo.mark_dynamic(value, dimension)


@contextmanager
def no_layer_left_out() -> Iterator[None]:
    """While it is in force, a pass fails where the compiler would leave a layer as it is.

    For it the layers of all models in a process are one function, which it compiles for so many
    kinds only; it would say so in its log.

    Raises:
        RuntimeError: There are too many.
    """
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "this process has compiled layers of as many kinds as torch does; start another, "
                "or raise torch._dynamo.config.recompile_limit"
            ) from error


def unfuse_layers(module: PreTrainedModel) -> None:
    """Lets layers run as they are again."""
    for layer in _layers(module):
        layer._compiled_call_impl = None


def _layers(module: PreTrainedModel) -> list[nn.Module]:
    """The layers that the model repeats, in its order.

    By the classes that a model names as those that must not be split between devices.
    """
    names = set(module._no_split_modules or ())
    return [child for child in module.modules() if type(child).__name__ in names]
