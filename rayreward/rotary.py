"""Rotary embeddings of a compiled layer, left to attention.

transformers turns queries and keys by ten operators, of which torch.compile makes three passes over
memory, 2 % of a CPU's time. The kernel for attention (`rayreward.native`) reads both anyway.

Knows torch's graphs; does not know models: what is no rotary embedding in a graph stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten


class LeaveToAttention(CustomGraphPass):  # type: ignore[misc]
    """Where queries and keys are turned by the same angles, `rayreward.flat`'s operator does it."""

    def __call__(self, graph: Graph) -> None:
        """Changes a graph as Inductor is about to make loops of it."""
        attention = torch.ops.rayreward.attention.default
        for node in graph.find_nodes(op="call_function", target=attention):
            query, key, values, _, _, *score = node.args
            queries, *angles = _turned(query)
            keys, *others = _turned(key)
            if angles and angles == others:
                node.args = (queries, keys, values, *angles, *score)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Of this file, for the compiler's cache."""
        return get_hash_for_files((__file__,))


def _turned(node: Any) -> tuple[Any, ...]:
    """A node that turns heads as heads, cosines and sines; another one by itself.

    Heads are `(1, heads, T, D)`, angles `(1, 1, T, D)`. Source: transformers' `rotate_half`.
    """
    match node:
        case Node(
            target=_aten.add.Tensor,
            args=(
                Node(target=_aten.mul.Tensor, args=(Node() as heads, Node() as cosines)),
                Node(
                    target=_aten.mul.Tensor,
                    args=(
                        Node(
                            target=_aten.cat.default,
                            args=(
                                [
                                    Node(
                                        target=_aten.neg.default,
                                        args=(
                                            Node(
                                                target=_aten.slice.Tensor,
                                                args=(second, 3, int(half), int()),
                                            ),
                                        ),
                                    ),
                                    Node(target=_aten.slice.Tensor, args=(first, 3, 0, int(size))),
                                ],
                                -1,
                            ),
                        ),
                        Node() as sines,
                    ),
                ),
            ),
        ) if first is second is heads and half == size:
            whole, *angles = (n.meta["val"] for n in (heads, cosines, sines))
            depth = whole.shape[3]
            if depth == 2 * half and all(_fits(a, whole) for a in angles):
                return heads, cosines, sines
    return (node,)


def _fits(angles: torch.Tensor, heads: torch.Tensor) -> bool:
    return (
        angles.dtype == heads.dtype
        and angles.dim() == 4
        and angles.shape[:2] == (1, 1)
        and angles.shape[3] == heads.shape[3]
    )
