"""Code of our own for CPUs, in C++: compiled on first use (`compiler`).

It needs a few seconds and no package. Where there is no compiler, or it fails, there is no such
code, and `find_kernels` says why.

Knows compilers and files; does not know models or how a batch was laid out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rayreward.native.compiler import NotCompiled, compiled

_HERE = Path(__file__).parent
OPERATORS = (_HERE / "operators.cpp",)
"""Loaded by `rayreward.operators`: it needs torch."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "attention": (
        ctypes.c_int,
        *5 * (ctypes.c_void_p,),
        *5 * (ctypes.c_int64,),
        *2 * (ctypes.c_void_p,),
        *(ctypes.c_float, ctypes.c_float, ctypes.c_int64, ctypes.c_int),
    ),
    "linear": (
        *2 * (ctypes.c_int,),
        *4 * (ctypes.c_void_p,),
        *3 * (ctypes.c_int64,),
        ctypes.c_int,
    ),
    "convolution": (
        *5 * (ctypes.c_void_p,),
        *3 * (ctypes.c_int64,),
        ctypes.c_int,
    ),
    "recurrence": (
        *9 * (ctypes.c_void_p,),
        *(ctypes.c_int, ctypes.c_float, ctypes.c_int),
    ),
    "hash": (
        *(ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_int),
    ),
}
"""What each kernel is called with. It has a file and a header of its name."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled kernels.

    Attributes:
        identity: Stands for their source, compiler and instructions: 12 hexadecimal digits.
        attention: `rayreward_attention` of `attention.h`. It runs without the interpreter's lock.
        linear: `rayreward_linear` of `linear.h`, likewise.
        convolution: `rayreward_convolution` of `convolution.h`, likewise.
        recurrence: `rayreward_recurrence` of `recurrence.h`, likewise.
        hash: `rayreward_hash` of `hash.h`, likewise.
    """

    identity: str
    attention: Callable[..., None]
    linear: Callable[..., None]
    convolution: Callable[..., None]
    recurrence: Callable[..., None]
    hash: Callable[..., None]


@cache
def find_kernels() -> Kernels | str:
    """Compiles the kernels, or takes those compiled before; else says why there are none."""
    try:
        return load_kernels()
    except NotCompiled as error:
        return str(error)


def load_kernels() -> Kernels:
    """As `find_kernels`.

    Raises:
        NotCompiled: There is no compiler, it fails, or what it made can't be loaded.
    """
    sources = [_HERE / f"{name}.cpp" for name in _SIGNATURES]
    with compiled("kernels", sources) as library:
        try:
            loaded = ctypes.CDLL(str(library.path))
        except OSError as error:
            raise NotCompiled(f"{library.path} can't be loaded: {error}. Remove it.") from error
    functions: dict[str, Any] = {}
    for name, arguments in _SIGNATURES.items():
        functions[name] = loaded[f"rayreward_{name}"]
        functions[name].argtypes, functions[name].restype = arguments, None
    return Kernels(library.identity, **functions)
