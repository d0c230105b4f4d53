"""What numbers of rows a matrix product may have: streams are filled up to one of them.

Libraries take other kernels for other numbers of rows, and other kernels sum in another order. On a
CPU that is so for what is left of a thread's share after whole blocks of rows. On a GPU nobody says
where, so there are few sizes, and each is tried when a model is loaded (`rayreward.invariance`).

Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of rows.

    Attributes:
        multiple: What all of them are multiples of; the smallest one.
        per_doubling: How many there are at most from one power of two to the next; null for all.
    """

    multiple: int
    per_doubling: int | None = None

    def filled(self, rows: int) -> int:
        """The smallest size that holds so many rows, at least one."""
        step = self.multiple
        if self.per_doubling is not None:
            below = 2 ** ((rows - 1).bit_length() - 1) if rows > 1 else 1
            step = max(step, below // self.per_doubling)
        return rows + -rows % step

    def up_to(self, most: int) -> Iterator[int]:
        """All sizes that some number of rows up to `most` is filled up to."""
        rows = 0
        while rows < most:
            rows = self.filled(rows + 1)
            yield rows


ON_CPU = Sizes(8)
"""MKL without AVX-512 moves bits for some numbers of rows that are no multiple of 4 (tried: 1 to 96
threads), with it below 8 rows. oneDNN, with weights in its order, did so for none."""
ON_GPU = Sizes(256, 8)
"""Below 256 rows the bits of an H100's products go by the number of rows. 8 per doubling add 3 % on
the average to what fills no batch, and make 32 sizes up to 16,384."""
