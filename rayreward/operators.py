"""Functions that stand in a compiled graph as one operator each, which no compiler looks into.

`torch.library.custom_op` checks at every call what a function did with its arguments, 2 % of the
time that a CPU takes for short texts; these functions are called as they are.

Knows torch's operators; does not know what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

import torch

_P = ParamSpec("_P")
_LIBRARY = torch.library.Library("rayreward", "FRAGMENT")
_KEYS = ("CPU", "MkldnnCPU")
"""Of tensors in plain order and in oneDNN's."""


def define_on_cpu(
    name: str, compute: Callable[_P, torch.Tensor], like: Callable[_P, torch.Tensor]
) -> Callable[_P, torch.Tensor]:
    """Makes an operator of a function that mutates nothing and returns no view of an argument.

    Args:
        name: Its name among the project's operators.
        compute: What it does, its arguments and result annotated.
        like: Takes the same; returns an empty tensor like the result.
    """
    schema = torch.library.infer_schema(compute, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.flexible_layout,))
    for key in _KEYS:
        _LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"rayreward::{name}", like, lib=_LIBRARY)
    operator: Callable[_P, torch.Tensor] = getattr(torch.ops.rayreward, name).default
    return operator
