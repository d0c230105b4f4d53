"""A decoder's layers compiled by `torch.compile`: what is elementwise, in few passes over memory.

Norms, rotary embeddings, activations and the residual stream are some thirty operators a layer, and
each reads and writes all of a stream. On a GPU, whose products are fast, that takes a third of the
time, on a CPU a tenth. Compiled, they are a handful of kernels; products stay the libraries' own.
Attention (`rayreward.attention`) is called from between the compiled parts on a GPU, and stands in
a layer's one graph as an operator on a CPU, where each part more costs a tenth of a millisecond.

The last layer stays as it is: within it the stream is narrowed (`rayreward.narrowing`).
Kernels are chosen without measuring, so that every actor of a kind has the same ones (G2).

For decoders only: an encoder pools by a mode of torch's (`rayreward.flat`) that the compiler would
take for a part of each layer.

Knows torch's and transformers' modules; does not know what a stream is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import PreTrainedModel

_OPTIONS = {"deterministic": True, "cpp.dynamic_threads": True}
"""Of Inductor: no reduction is summed in an order that a measurement chose. On a CPU kernels run on
as many threads as their caller has, not on as many as there were when they were compiled."""


def fuse_layers(module: PreTrainedModel) -> bool:
    """Compiles all repeated layers but the last, at the first pass that follows.

    Numbers of tokens are left open: that pass compiles for all of them.

    Returns:
        Whether there is anything to compile.
    """
    layers = _layers(module)[:-1]
    for layer in layers:
        layer.compile(dynamic=True, options=_OPTIONS)
    return bool(layers)


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
