"""Linear layers with their weights in the order in which oneDNN reads them.

On a CPU a product with weights in that order is faster than with weights row by row, and gives the
same bits. The ordered weights take the place of the plain ones, so that memory holds them once, and
can be put back into plain order, so that a hash sees what rewards are computed from.

Knows torch's modules; does not know what they are part of.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import nn

_ROWS = 2_048
"""Rows that the order is made for; it works for any number."""

_MACHINES = ("x86_64", "AMD64")
"""Where this was measured."""


class PackedLinear(nn.Module):
    """`nn.Linear` on a CPU.

    Attributes:
        weight: In oneDNN's order; `weight.to_dense()` is `(out, in)`.
        bias: `(out,)`, or null.
    """

    weight: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", packed(linear.weight.detach()))
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(…, in)` to `(…, out)`. By the operator that torch.compile takes for linear layers."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, "none", [], ""
        )
        return product


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Weights `(out, in)` in oneDNN's order."""
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return ordered


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes with such weights on this machine."""
    if platform.machine() not in _MACHINES or not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (
        dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linear_layers(module: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Replaces linear layers in a module that is on a CPU, one after the other.

    A layer that is used in several places stays one layer.

    Args:
        module: Whose layers are replaced.
        wanted: Tells by a layer's name whether to replace it.
    """
    done: dict[nn.Module, PackedLinear] = {}
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if wanted(name)]
    for name in names:
        layer = module.get_submodule(name)
        if type(layer) is nn.Linear and layer.weight is not None and can_pack(layer.weight.dtype):
            done[layer] = PackedLinear(layer)
            layer.weight = None  # type: ignore[assignment]  # frees it before the next is packed
        if layer in done:
            module.set_submodule(name, done[layer])
