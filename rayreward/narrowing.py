"""After a model's last attention, only the tokens that a reward comes from go on.

What follows it in the last layer works on each token by itself: the product that ends attention,
the residual stream, norms and the MLP. For the other tokens nobody reads the results. A decoder's
layer does not know that, so its tensors are narrowed under way, whatever it does with them.

Knows torch; does not know models. That what follows is of this kind has to be found by a trial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class Narrowing(TorchFunctionMode):
    """While it is in force, operators get `(1, M, …)` for what a pass has made as `(1, T, …)`.

    Told from weights by inference mode: passes run in it, and weights are made outside of it.
    Shape legend: T tokens in a stream, of which M are wanted.
    """

    def __init__(self, tokens: int, wanted: torch.Tensor) -> None:
        """
        Args:
            tokens: T.
            wanted: `(M,)` places in the stream, on its device; M is less than T.
        """
        super().__init__()
        self._tokens = tokens
        self._wanted = wanted

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._lays_out(args):
            args, kwargs = tree_map_only(torch.Tensor, self._narrow, (args, kwargs))
        return func(*args, **kwargs)

    def _lays_out(self, args: tuple[Any, ...]) -> bool:
        """Whether this is `x.reshape(1, T, …)` or its like: what it gives is narrowed next."""
        match args:
            case (_, int(1), self._tokens, *_) | (_, (int(1), self._tokens, *_), *_):
                return True
        return False

    def _narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        # T may be as many as a token's numbers are, or a weight's, which no pass has made
        may_be = tensor.is_inference() and tensor.dim() > 2
        of_stream = may_be and tensor.shape[:2] == (1, self._tokens)
        return tensor[:, self._wanted] if of_stream else tensor
