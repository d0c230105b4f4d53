"""Linear layers with their weights in the order in which a CPU's products read them.

That is oneDNN's order, or that of our own kernel where it is faster (`rayreward.panels`). A product
with weights in either is faster than with weights row by row, and its bits do not depend on how
many rows there are, from two on: those of MKL, which multiplies plain weights, do on processors
with AVX-512. GPT-2's `Conv1D` is such a layer, too, its weights transposed. The ordered weights
take the place of the plain ones, so that memory holds them once, and can be put back into plain
order, so that a hash sees what rewards are computed from.

Where a processor multiplies half precision more slowly than float32, products are computed in it
and rounded once, and the weights are held as float32, unless our own kernel takes them as they are.
Without instructions for it, it would take several times as long; Intel's AVX-512 instructions for
bfloat16 run at half of float32's speed, unlike AMD's, and unlike the AMX tiles of newer processors.

Knows these layers; does not know what they are part of.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rayreward import panels
from rayreward.operators import define

_ROWS = 2_048
"""Rows that the order is made for; it works for any number."""

_MACHINES = ("x86_64", "AMD64")
"""Where this was measured."""


class PackedLinear(nn.Module):
    """`nn.Linear`, or a `Conv1D`, on a CPU.

    Attributes:
        weight: `(out, in)` in the order of products here, perhaps wider than `dtype`.
        bias: `(out,)`, or null.
        dtype: Of the layer that this one replaces, and of its results.
        transposed: Whether that layer's weight is `(in, out)`, as a `Conv1D` has it.
    """

    weight: torch.Tensor

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.dtype = linear.weight.dtype
        self.transposed = isinstance(linear, Conv1D)
        weight = linear.weight.detach()
        self.register_buffer("weight", packed(weight.t() if self.transposed else weight))
        self._wide = torch.float32 if _in_panels(self.weight) else self.weight.dtype
        self.bias = (
            None
            if linear.bias is None
            else nn.Parameter(linear.bias.detach().to(self._wide), requires_grad=False)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(…, in)` to `(…, out)`."""
        if torch.compiler.is_compiling():
            # loops before and after hold float32 anyway, which our own kernel takes, too
            return multiply_in_graph(rows.to(self._wide), self.weight, self.bias).to(self.dtype)
        return multiply(rows, self.weight, self.bias, self.dtype)

    def part(self, name: str) -> torch.Tensor:
        """Weight or bias as the layer that this one replaces had it, bit for bit."""
        if name == "bias":
            assert self.bias is not None, "the layer has no bias"
            return self.bias.to(self.dtype)
        weight = unpacked(self.weight)
        return (weight.t().contiguous() if self.transposed else weight).to(self.dtype)

    def plain(self) -> dict[str, torch.Tensor]:
        """All parts of the layer that this one replaces, by name."""
        return {name: self.part(name) for name in self.state_dict()}


def multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`(…, in)` by a packed weight to `(…, out)` in a precision, computed in that of the weight."""
    return _multiply(rows.to(weight.dtype), weight, bias).to(dtype)


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if _in_panels(weight):
        return panels.multiply(rows, weight, bias)
    linear = torch.ops.mkldnn._linear_pointwise.default
    product: torch.Tensor = linear(rows, weight, bias, "none", [], "")
    return product


def _like_product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out = weight.shape[0] * weight.shape[2] if _in_panels(weight) else weight.shape[0]
    return rows.new_empty((*rows.shape[:-1], out))


multiply_in_graph = define("linear", _multiply, _like_product)
"""For torch.compile, which would look for a plain weight in the other one."""


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Weights `(out, in)` in the order in which they are multiplied here, perhaps wider."""
    weight = as_multiplied(weight)
    if panels.is_faster() and panels.fits(weight):
        return panels.to_panels(weight)
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return ordered


def as_multiplied(weight: torch.Tensor) -> torch.Tensor:
    """Weights `(out, in)` in the precision in which rows are given to products here."""
    is_taken = is_fast(weight.dtype) or (panels.is_faster() and panels.fits(weight))
    return weight if is_taken else weight.float()


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """What `packed` was given, perhaps wider."""
    return panels.from_panels(weight) if _in_panels(weight) else weight.to_dense()


def _in_panels(weight: torch.Tensor) -> bool:
    return weight.dim() == 3


def is_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in this precision about as fast as in float32, or faster.

    Told by what the processor is, never by timing, so that actors on equal ones agree.
    """
    match dtype:
        case torch.bfloat16:
            has = torch.cpu.get_capabilities()
            halved = "Intel" in has.get("cpu_name", "") and not has.get("amx_bf16", False)
            return has_bfloat16() and not halved
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes here with weights of this precision, or with the same ones wider."""
    here = platform.machine() in _MACHINES and torch.backends.mkldnn.is_available()
    return here and dtype in (torch.float32, torch.bfloat16, torch.float16)


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
        if (
            isinstance(layer, nn.Linear | Conv1D)
            and type(layer) in (nn.Linear, Conv1D)  # and not something made of one
            and layer.weight is not None
            and can_pack(layer.weight.dtype)
        ):
            done[layer] = PackedLinear(layer)
            layer.weight = None  # frees it before the next is packed
        if layer in done:
            module.set_submodule(name, done[layer])


def unpack_linear_layers(module: nn.Module) -> None:
    """Puts plain layers back in the place of packed ones, bit for bit."""
    done: dict[PackedLinear, nn.Linear | Conv1D] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, PackedLinear):
            if layer not in done:
                done[layer] = _plain_layer(layer)
            module.set_submodule(name, done[layer])


def _plain_layer(packed_layer: PackedLinear) -> nn.Linear | Conv1D:
    plain = packed_layer.plain()
    rows, columns = plain["weight"].shape
    with torch.device("meta"):
        layer = (
            Conv1D(columns, rows)
            if packed_layer.transposed
            else nn.Linear(columns, rows, bias="bias" in plain)
        )
    layer.load_state_dict(plain, assign=True)
    return layer.requires_grad_(False)
