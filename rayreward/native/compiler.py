"""C++ files turned into libraries on first use, and kept for the next process.

Compiled for the processor at hand by the system's C++ compiler. The result is kept in the user's
cache, under a name that stands for the sources, the compiler and the processor's instructions:
another of these is another file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
PATIENCE_S = 120.0
"""A compiler that takes longer has failed."""


class NotCompiled(Exception):
    """A file can't be compiled here; says why."""


def _flags() -> tuple[str, ...]:
    """Of the compiler. Apple's knows its processor unasked, and has no OpenMP: torch's is taken."""
    if sys.platform != "darwin":
        target: tuple[str, ...] = ("-march=native", "-fopenmp")
    else:
        torch = find_spec("torch")
        assert torch
        assert torch.origin
        openmp = Path(torch.origin).parent / "lib" / "libomp.dylib"
        target = ("-Xclang", "-fopenmp", str(openmp), f"-Wl,-rpath,{openmp.parent}")
    return ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", *target)


@dataclass(frozen=True, slots=True)
class Library:
    """Compiled files.

    Attributes:
        path: Of the library.
        identity: Stands for its sources, compiler and instructions: 12 hexadecimal digits.
    """

    path: Path
    identity: str


@contextlib.contextmanager
def compiled(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Iterator[Library]:
    """Compiles files into a library, or takes what was compiled before.

    Args:
        name: Of the library.
        sources: The C++ files, side by side; headers beside them may be part of them.
        flags: Of the compiler, beside the usual ones.

    Yields:
        The library, which is to be loaded before the end: where there is no cache, it is gone then.

    Raises:
        NotCompiled: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    identity = _identity(compiler, sources, flags)
    with _cache() as folder:
        library = folder / f"{name}-{identity}.so"
        with _alone(folder):
            if not library.exists():
                _compile(compiler, sources, flags, library)
        yield Library(library, identity)


def find_compiler() -> str:
    """The one that `CXX` names, or the first of those that there usually are.

    Raises:
        NotCompiled: There is none.
    """
    asked = os.environ.get("CXX", "")
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return found
    raise NotCompiled(f"no C++ compiler: looked for {asked or ', '.join(COMPILERS)}")


def _identity(compiler: str, sources: Sequence[Path], flags: Sequence[str]) -> str:
    """Of the sources and of all that the compiler says of itself and of its target."""
    macros = _run(compiler, *_flags(), "-dM", "-E", "-x", "c++", os.devnull)
    files = [*sources, *sorted(sources[0].parent.glob("*.h"))]
    parts = [*(file.read_bytes() for file in files), repr((_flags(), flags)).encode(), macros]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _run(compiler, *_flags(), *map(str, sources), *flags, "-o", str(made))
        made.replace(library)


def _run(*command: str) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise NotCompiled(f"{command[0]} failed: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{command[0]} failed: {error}") from error
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
