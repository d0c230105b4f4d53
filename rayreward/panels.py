"""Products of linear layers by our own kernel for CPUs, with weights in panels of 16 of their rows.

On processors with vectors of 256 bits (AVX2, and no AVX-512) they are faster than oneDNN's
(`docs/performance.md`). Sums are float32; rows, weights and results float32 or bfloat16, which such
processors have no instructions for: it is widened as it is read. A product's bits depend on its row
alone, by construction, from one row on.

Knows the kernel; does not know layers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.profiler import record_function

from rayreward.native import Kernels, find_kernels

_PANEL = 16
_DTYPES = (torch.float32, torch.bfloat16)


@cache
def is_faster() -> bool:
    """Whether this is such a processor, and the kernel could be compiled.

    Told by what the processor is, never by timing, so that actors on equal ones agree.
    """
    has_avx2_only: bool = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return has_avx2_only and isinstance(find_kernels(), Kernels)


def fits(weight: torch.Tensor) -> bool:
    """Whether a weight `(out, in)` can lie in panels."""
    return weight.dtype in _DTYPES and weight.shape[0] % _PANEL == 0 and weight.numel() > 0


def to_panels(weight: torch.Tensor) -> torch.Tensor:
    """`(out, in)` to `(out / 16, in, 16)`, in bfloat16 with a panel's halves in turns."""
    panels = weight.reshape(-1, _PANEL, weight.shape[1]).transpose(1, 2)
    if weight.dtype is torch.bfloat16:
        panels = panels.unflatten(2, (2, -1)).transpose(2, 3)
    return panels.contiguous().flatten(2)


def from_panels(panels: torch.Tensor) -> torch.Tensor:
    """What `to_panels` was given."""
    if panels.dtype is torch.bfloat16:
        panels = panels.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
    return panels.transpose(1, 2).flatten(0, 1).contiguous()


def multiply(
    rows: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`(…, in)` by `(out / 16, in, 16)` to `(…, out)`.

    Rows and results are float32, or bfloat16 if the weight is, too; a bias is float32.

    Raises:
        RuntimeError: Rows are not as wide as the weight or of another precision, or there is no
            kernel.
    """
    kernels = find_kernels()
    if not isinstance(kernels, Kernels):
        raise RuntimeError(f"no compiled kernel: {kernels}")
    many, width, _ = panels.shape
    if rows.shape[-1] != width:
        raise RuntimeError(f"rows of {rows.shape[-1]} columns by a weight of {width}")
    if rows.dtype not in (torch.float32, panels.dtype):
        raise RuntimeError(f"rows in {rows.dtype} by a weight in {panels.dtype}")
    rows = rows.contiguous()
    results = rows.new_empty((*rows.shape[:-1], many * _PANEL))
    with record_function("rayreward::linear"):
        kernels.linear(
            rows.dtype is torch.bfloat16,
            panels.dtype is torch.bfloat16,
            rows.data_ptr(),
            panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            results.data_ptr(),
            rows.numel() // width,
            many * _PANEL,
            width,
            torch.get_num_threads(),
        )
    return results
