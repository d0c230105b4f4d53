"""A mixture's experts on a CPU, with their weights in the order in which products read them.

transformers multiplies an expert's tokens by weights in plain order, and how many tokens an expert
gets depends on all the others in a batch: so a reward's last bits would depend on its neighbours.
Products with packed weights (`rayreward.packing`) do not go by the number of rows.

Knows experts that transformers' ExpertsInterface may compute; does not know what routes tokens to
them. Source: transformers' integrations/moe.py, `grouped_mm_experts_forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from rayreward.packing import can_pack, multiply, packed, unpacked

_PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the weights of all experts, `(E, out, in)` or transposed; with gates the first and the
last, without the second and the last."""


class PackedExperts(nn.Module):
    """The weights of E experts for one of their products.

    Attributes:
        dtype: Of the weights that this one replaces, and of its results.
        transposed: Whether those are `(E, in, out)`.
    """

    def __init__(self, weights: torch.Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.dtype = weights.dtype
        self.transposed = transposed
        for expert, weight in enumerate(weights.detach()):
            self.register_buffer(str(expert), packed(weight.t() if transposed else weight))

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Multiplies each expert's rows.

        Args:
            rows: `(S, in)`, those of an expert together, in the experts' order.
            counts: How many each of the E experts has.

        Returns:
            `(S, out)`.
        """
        shares = zip(rows.split(counts), self.buffers(), strict=True)
        return torch.cat([self._product(share, weight) for share, weight in shares if len(share)])

    def plain(self) -> torch.Tensor:
        """The weights as they were, bit for bit."""
        weights = [unpacked(weight).to(self.dtype) for weight in self.buffers()]
        return torch.stack([weight.t() if self.transposed else weight for weight in weights])

    def _product(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at_least_two = rows if len(rows) > 1 else rows.expand(2, -1)  # one would be a kernel apart
        return multiply(at_least_two, weight, None, self.dtype)[: len(rows)]


def pack_experts(module: nn.Module) -> None:
    """Packs the experts in a module that is on a CPU, and has them computed here."""
    for experts in list(_experts(module)):
        for name in _PRODUCTS:
            if isinstance(weights := getattr(experts, name, None), nn.Parameter):
                delattr(experts, name)
                setattr(experts, name, PackedExperts(weights, transposed=experts.is_transposed))
        experts.forward = partial(_forward, experts)


def unpack_experts(module: nn.Module) -> None:
    """Puts plain weights back in the place of packed ones, bit for bit."""
    for experts in list(module.modules()):
        for name, weights in list(experts.named_children()):
            if isinstance(weights, PackedExperts):
                delattr(experts, name)
                setattr(experts, name, nn.Parameter(weights.plain(), requires_grad=False))
                experts.__dict__.pop("forward", None)


def _experts(module: nn.Module) -> Iterator[Any]:
    """What transformers' `use_experts_implementation` has marked."""
    for child in module.modules():
        weights: Any = getattr(child, "down_proj", None)
        of_all = isinstance(weights, nn.Parameter) and weights.dim() == 3
        if of_all and can_pack(weights.dtype) and hasattr(child, "_apply_gate"):
            yield child


def _forward(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' own: `(T, H)` with K experts for each token, `(T, K)`, to `(T, H)`."""
    tokens, k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.flatten(), stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
    first = "gate_up_proj" if experts.has_gate else "up_proj"

    def product(name: str, rows: torch.Tensor) -> torch.Tensor:
        results: torch.Tensor = getattr(experts, name)(rows, counts)
        return results + getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else results

    rows = product(first, hidden[order // k])
    rows = product("down_proj", (experts._apply_gate if experts.has_gate else experts.act_fn)(rows))
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.flatten()[order, None]
    summed = rows[order.argsort()].view(tokens, k, -1).sum(1)
    return summed.to(hidden.dtype)
