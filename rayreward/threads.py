"""How the threads that compute together wait for one another. Process-wide.

A batch on a CPU is hundreds of short products and functions, each shared out among threads, which
wait for the last of them. To sleep and be woken again takes longer than most of these waits; to
spin until the others are there takes the cores from those that are waited for, once something else
runs on the machine, too. So they spin for a moment, and then sleep.
"""

from __future__ import annotations

import os

_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
"""Source: OpenMP's specification; libgomp's manual. Where both are set libgomp, which torch comes
with on Linux, goes by the second one."""

_TURNS = "3000"
"""Between 0.03 and 0.2 ms, by the length of a processor's pause."""


def wait_briefly() -> None:
    """Sets it for OpenMP, which reads it when torch is imported.

    Where the environment says how threads wait, that holds.
    """
    if _POLICY not in os.environ:
        os.environ[_POLICY] = "PASSIVE"
        os.environ.setdefault(_SPINS, _TURNS)
