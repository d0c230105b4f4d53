"""Activation functions whose results do not depend on where in a stream a token lies.

torch shares a function's elements out among threads, and computes whole vectors with one algorithm
and what is left of a thread's share with another, which may round otherwise. So a token at such a
border would change its bits with the number of tokens beside it. Here all shares are whole vectors.

Knows activation functions and how torch shares elements out on a CPU; does not know models.
Source: ATen's Parallel.h (`parallel_for`), TensorIterator.h (`GRAIN_SIZE`), cpu/Activation.cpp
(`GeluKernelImpl`) and cpu/Loops.h (`vectorized_loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
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

_FUNCTIONS = frozenset(
    {
        *(torch.sigmoid, torch.Tensor.sigmoid, functional.silu, functional.gelu),
        *(functional.softplus, functional.mish, functional.logsigmoid),
    }
)
"""Those that models call by themselves and that round otherwise outside of whole vectors, unlike
`exp`, `tanh`, `sin` and `cos`."""

_in_module: ContextVar[bool] = ContextVar("in_module", default=False)


class WholeVectors(nn.Module):
    """An activation function on a CPU, every thread's share of which is whole vectors.

    Attributes:
        function: What it computes, element by element.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self._is_gelu = isinstance(function, (nn.GELU, GELUActivation, GELUTanh))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `function`. Inductor, which makes loops of its own, takes it as it is."""
        if torch.compiler.is_compiling():
            computed: torch.Tensor = self.function(x)
            return computed
        token = _in_module.set(True)
        try:
            return _by_whole_vectors(self.function, x, is_gelu=self._is_gelu)
        finally:
            _in_module.reset(token)


class WholeVectorsOfFunctions(TorchFunctionMode):
    """While it is in force, activation functions that are no modules are computed so, too.

    It takes time at every operator: so it is for the models that call such functions.

    Attributes:
        called: Whether one was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _FUNCTIONS or _in_module.get() or not args:
            return func(*args, **(kwargs or {}))
        self.called = True
        x, *rest = args
        return _by_whole_vectors(
            lambda part: func(part, *rest, **(kwargs or {})), x, is_gelu=func is functional.gelu
        )


def _by_whole_vectors(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, is_gelu: bool
) -> torch.Tensor:
    elements = whole = x.numel()
    while rest := whole % (_shares(whole, is_gelu=is_gelu) * _VECTORS):
        whole -= rest
    if whole == elements:
        return function(x.contiguous())
    elements_in_line, left = x.flatten(), elements - whole
    filled_up = functional.pad(elements_in_line[whole:], (0, -left % _VECTORS))
    parts = [function(elements_in_line[:whole])] if whole else []
    return torch.cat([*parts, function(filled_up)[:left]]).view(x.shape)


def _shares(elements: int, *, is_gelu: bool) -> int:
    """How many threads get some of so many elements."""
    threads = torch.get_num_threads()
    if is_gelu:
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
