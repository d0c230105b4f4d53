"""TRL: a reward function for `GRPOTrainer` and `RLOOTrainer`.

    trainer = GRPOTrainer(model, reward_funcs=PoolReward("rm"), …)

Knows what TRL passes to a reward function; does not import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rayreward.integrations.pools import PoolClient
from rayreward.types import Outcome, Reward, Verbatim

if TYPE_CHECKING:
    from rayreward.pool import RewardPool

_ABOUT_THE_TEXT = ("tools", "chat_template_kwargs")
"""Columns of a dataset that decide what a conversation looks like to a model."""


class PoolReward:
    """Rewards from a pool; standard and conversational prompts.

    The model sees what it would see if TRL held it: conversations in its own chat template, plain
    text as it is, with no EOS after it. A reward that could not be computed is None: TRL leaves it
    out of the sum.
    """

    def __init__(
        self,
        pool: RewardPool | str | None = None,
        *,
        name: str = "pool_reward",
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            pool: A pool, or the name of one. Null: the environment variable RAYREWARD_POOL has it.
            name: What TRL calls these rewards in its logs.
            timeout_s: How long to wait for the rewards of a batch; then `PoolTimeoutError`.
        """
        self.__name__ = name
        self._client = PoolClient(pool, timeout_s=timeout_s)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """For each completion its reward.

        Args:
            prompts: N texts or lists of messages.
            completions: N texts or lists of messages.
            **columns: The other columns of the dataset, and whatever else TRL passes.
        """
        return _read(self._client.ask(_samples(prompts, completions, columns)))


class AsyncPoolReward(PoolReward):
    """Like `PoolReward`; TRL calls it together with other asynchronous reward functions."""

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """As `PoolReward`."""
        return _read(await self._client.ask_async(_samples(prompts, completions, columns)))


def _samples(
    prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> list[Any]:
    extra = {name: columns[name] for name in _ABOUT_THE_TEXT if columns.get(name) is not None}
    return [
        Verbatim(prompt + completion)
        if isinstance(prompt, str)
        else {"prompt": prompt, "completion": completion}
        | {name: column[row] for name, column in extra.items()}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _read(outcomes: Iterable[Outcome]) -> list[float | None]:
    return [outcome.value if isinstance(outcome, Reward) else None for outcome in outcomes]
