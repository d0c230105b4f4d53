"""Freed memory: kept for a while, then handed back. In a process of its own: it is process-wide."""

from __future__ import annotations

import subprocess
import sys

PIECES = """
import sys
from rayreward.allocator import FreedMemory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

now = 0.0
freed = FreedMemory(lambda: now)
freed.keep()
before = resident()
blocks = [bytearray(b"x") * 2**18 for _ in range(800)]  # 200 MB, of which every other block goes
blocks = blocks[::2]
held = [resident()]
for now in (119.0, 120.0, 121.0):
    freed.hand_back()
    held.append(resident())
print(*(round((size - before) / 2**20) for size in held))
"""


def test_what_lies_in_pieces_is_handed_back_every_other_minute() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PIECES], capture_output=True, text=True, check=True, timeout=60
    )
    kept, early, due, after = map(int, done.stdout.split())
    assert kept == early > 190
    assert due == after < 120
