"""Activation functions whose results do not depend on where in a stream a token lies.

torch shares a function's elements out among threads, and computes whole vectors with one algorithm
and what is left of a thread's share with another, which may round otherwise. So a token at such a
border would change its bits with the number of tokens beside it. Here all shares are whole vectors.

Knows activation modules and how torch shares elements out on a CPU; does not know models.
Source: ATen's Parallel.h (`parallel_for`), TensorIterator.h (`GRAIN_SIZE`), cpu/Activation.cpp
(`GeluKernelImpl`) and cpu/Loops.h (`vectorized_loop`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import GELUActivation, GELUTanh

_MODULES = ("transformers.activations", "torch.nn.modules.activation")
_MIX_ELEMENTS = (
    nn.Softmax,
    nn.Softmax2d,
    nn.Softmin,
    nn.LogSoftmax,
    nn.GLU,
    nn.MultiheadAttention,
)
"""What torch counts as activation functions, but what gives no element by itself."""

_GRAIN = 32_768
"""Elements that a thread gets at least."""

_ALL_THREADS_FROM = 16_384
"""Elements from which `gelu` is shared out among all threads."""

_VECTORS = 64
"""Elements that are computed together: two vectors of 512 bits in half precision."""


class WholeVectors(nn.Module):
    """An activation function on a CPU, every thread's share of which is whole vectors.

    Attributes:
        function: What it computes, element by element.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `function`. Inductor, which makes loops of its own, takes it as it is."""
        if torch.compiler.is_compiling():
            return self._compute(x)
        elements = whole = x.numel()
        while rest := whole % (self._shares(whole) * _VECTORS):
            whole -= rest
        if whole in (elements, 0):
            return self._compute(x.contiguous())
        parts = x.flatten().split((whole, elements - whole))
        return torch.cat([self._compute(part) for part in parts]).view(x.shape)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        computed: torch.Tensor = self.function(x)
        return computed

    def _shares(self, elements: int) -> int:
        """How many threads get some of so many elements."""
        threads = torch.get_num_threads()
        if isinstance(self.function, (nn.GELU, GELUActivation, GELUTanh)):
            return threads if elements > _ALL_THREADS_FROM else 1
        return min(threads, max(1, -(-elements // _GRAIN)))


def keep_whole_vectors(module: nn.Module) -> None:
    """Replaces the activation functions in a module that is on a CPU, if they go by elements.

    One that is used in several places stays one.
    """
    done: dict[nn.Module, WholeVectors] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if _is_by_elements(child):
            module.set_submodule(name, done.setdefault(child, WholeVectors(child)))


def _is_by_elements(module: nn.Module) -> bool:
    known = type(module).__module__ in _MODULES and not isinstance(module, _MIX_ELEMENTS)
    return known and not list(module.parameters())
