"""Kernels of our own for CPUs, in C++: compiled on first use, kept for the next process.

Compiled for the processor at hand by the system's C++ compiler, which needs a few seconds and no
package. The result is kept in the user's cache, under a name that stands for the source, the
compiler and the processor's instructions: another of these is another file. Where there is no
compiler, or it fails, there are no such kernels, and `find_kernels` says why.

Knows compilers and files; does not know models or how a batch was laid out.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "attention.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE_S = 120.0
"""A compiler that takes longer has failed."""

_ARGUMENTS = (
    (ctypes.c_int,)
    + 5 * (ctypes.c_void_p,)
    + 4 * (ctypes.c_int64,)
    + 3 * (ctypes.c_void_p,)
    + (ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_int64)
    + 2 * (ctypes.c_int,)
)


class NoKernels(Exception):
    """The kernels can't be compiled here; says why."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled kernels.

    Attributes:
        identity: Stands for their source, compiler and instructions: 12 hexadecimal digits.
        attention: `rayreward_attention` of `attention.cpp`. It runs without the interpreter's lock.
    """

    identity: str
    attention: Callable[..., None]


@cache
def find_kernels() -> Kernels | str:
    """Compiles the kernels, or takes those compiled before; else says why there are none."""
    try:
        return load_kernels()
    except NoKernels as error:
        return str(error)


def load_kernels() -> Kernels:
    """As `find_kernels`.

    Raises:
        NoKernels: There is no compiler, it fails, or what it made can't be loaded.
    """
    compiler = _compiler()
    identity = _identity(compiler)
    with _cache() as folder:
        library = folder / f"{SOURCE.stem}-{identity}.so"
        with _alone(folder):
            if not library.exists():
                _compile(compiler, library)
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise NoKernels(f"{library} can't be loaded: {error}. Remove it.") from error
    attention: Any = loaded.rayreward_attention
    attention.argtypes, attention.restype = _ARGUMENTS, None
    return Kernels(identity, attention)


def _compiler() -> str:
    asked = os.environ.get("CXX", "")
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return found
    raise NoKernels(f"no C++ compiler: looked for {asked or ', '.join(COMPILERS)}")


def _identity(compiler: str) -> str:
    """Of the source and of all that the compiler says of itself and of its target."""
    macros = _run(compiler, *FLAGS[:3], "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull)
    return hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode() + macros).hexdigest()[:12]


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _run(compiler, *FLAGS, str(SOURCE), "-o", str(made))
        made.replace(library)


def _run(*command: str) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise NoKernels(f"{command[0]} failed: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{command[0]} failed: {error}") from error
    return done.stdout


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """The user's cache, or where that can't be written to a folder for this process."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "rayreward" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix="rayreward-native-") as scratch:
            yield Path(scratch)
    else:
        yield folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of the machine compile while the others wait for what it makes."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
