"""Functions that stand in a compiled graph as one operator each, which no compiler looks into.

They are in C++ (`native/operators.cpp`): by way of the interpreter each takes some 40 µs more, in
which only one thread works. Where those can't be compiled they are in Python, and called as they
are: `torch.library.custom_op` checks at every call what a function did with its arguments.

Knows torch's operators; does not know what they compute.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import torch

from rayreward.native import OPERATORS, Kernels, find_kernels
from rayreward.native.compiler import NotCompiled, compiled

_P = ParamSpec("_P")
_enter: Callable[..., None] | None = None
"""`rayreward_enter` of `operators.cpp`, once that is loaded."""

_LIBRARY = torch.library.Library("rayreward", "FRAGMENT")
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    f"-DRAYREWARD_TORCH={torch.__version__}",  # another one is another library
    f"-I{_TORCH / 'include'}",
    f"-L{_TORCH / 'lib'}",
    "-ltorch_cpu",
)


def define(
    name: str, compute: Callable[_P, torch.Tensor], like: Callable[_P, torch.Tensor]
) -> Callable[_P, torch.Tensor]:
    """Makes an operator of a function that mutates nothing and returns no view of an argument.

    Args:
        name: Its name among the project's operators.
        compute: What it does, its arguments and result annotated, where it is not in C++.
        like: Takes the same; returns an empty tensor like the result.
    """
    schema = torch.library.infer_schema(compute, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # for where nothing else is
    torch.library.register_fake(f"rayreward::{name}", like, lib=_LIBRARY)
    operator: Callable[_P, torch.Tensor] = getattr(torch.ops.rayreward, name).default
    return operator


def compile_operators() -> str | None:
    """From now on operators are those in C++, where they can be compiled.

    Returns:
        Why they can't be, else null.
    """
    global _enter
    if _enter is None:
        try:
            with compiled("operators", OPERATORS, _FLAGS) as library:
                torch.ops.load_library(library.path)
                loaded: Any = ctypes.CDLL(str(library.path))
        except (NotCompiled, OSError) as error:
            return str(error)
        enter, multiply_by = loaded.rayreward_enter, loaded.rayreward_multiply_by
        enter.argtypes, enter.restype = 2 * (ctypes.c_void_p,), None
        multiply_by.argtypes, multiply_by.restype = (ctypes.c_void_p,), None
        kernels = find_kernels()
        if isinstance(kernels, Kernels):
            multiply_by(ctypes.cast(kernels.linear, ctypes.c_void_p))  # type: ignore[arg-type]
        _enter = enter
    return None


@contextlib.contextmanager
def entered(kernel: Any, layout: ctypes.Structure) -> Iterator[None]:
    """While it is in force, operators in C++ attend to a stream on this thread.

    Args:
        kernel: `rayreward_attention` of `attention.h`.
        layout: `Layout`, likewise.
    """
    if _enter is None:
        yield
        return
    _enter(ctypes.cast(kernel, ctypes.c_void_p), ctypes.addressof(layout))
    try:
        yield
    finally:
        _enter(None, None)
