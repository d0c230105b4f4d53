"""Keeps Python's garbage collector from what never becomes garbage: the modules of a process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports without collecting garbage, and leaves the modules out of later collections.

    torch and transformers are more than half a million objects. Going through them again and again
    while they come took a quarter of the time of their import.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
