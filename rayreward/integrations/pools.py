"""The pool that an adapter asks: found by its name when it is first needed.

Adapters are made where a trainer is set up and used where it runs, in other processes, so they
hold a name. Knows pools; does not know any framework.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayreward.errors import ConfigError, NoRewardError
from rayreward.types import Failure, Outcome

if TYPE_CHECKING:
    from rayreward.pool import RewardPool

VARIABLE = "RAYREWARD_POOL"
"""Environment variable with the name of the pool to ask where an adapter is told of none."""


class PoolClient:
    """Asks one pool for rewards. Can be pickled if it was made from a name, or none."""

    def __init__(
        self, pool: RewardPool | str | None = None, *, timeout_s: float | None = None
    ) -> None:
        """
        Args:
            pool: A pool, or the name of one. Null: the environment variable RAYREWARD_POOL has it.
            timeout_s: How long to wait for the rewards of a call. Null: as long as it takes.
        """
        self._pool = pool
        self._timeout_s = timeout_s
        self._found: RewardPool | None = None

    @property
    def pool(self) -> RewardPool:
        """The pool, which is looked for the first time.

        Raises:
            ConfigError: Nothing says which pool.
            PoolError: There is no pool of that name.
        """
        if self._found is None:
            from rayreward.pool import RewardPool

            asked = self._pool or os.environ.get(VARIABLE)
            if not asked:
                raise ConfigError(
                    f"Nothing says which pool to ask: set {VARIABLE} to the name that it was "
                    "opened with, RewardPool(…, name='rm', lifetime='detached')."
                )
            self._found = RewardPool.connect(asked) if isinstance(asked, str) else asked
        return self._found

    def ask(self, batch: Iterable[Any]) -> Sequence[Outcome]:
        """For each item, as `RewardPool.score` takes them, its reward or why it has none."""
        return self.pool.score_audited(batch, timeout_s=self._timeout_s).outcomes

    async def ask_async(self, batch: Iterable[Any]) -> Sequence[Outcome]:
        """Like `ask`, without blocking the event loop; cancelled, it is dropped by the pool too."""
        audited = await self.pool.score_audited_async(batch, timeout_s=self._timeout_s)
        return audited.outcomes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_found": None}


def values(outcomes: Iterable[Outcome]) -> list[float]:
    """The rewards, for a framework that has no way to say that one is missing.

    Raises:
        NoRewardError: One could not be computed.
    """
    found = []
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            raise NoRewardError(
                f"Text {row} has no reward: {outcome.detail} ({outcome.status}). Leave it out, or "
                "open the pool with settings that allow it, such as truncation='left'."
            )
        found.append(outcome.value)
    return found


def turns(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what a framework keeps beside their text, such as token ids."""
    kept = ("role", "name", "content", "reasoning_content", "tool_calls", "tool_call_id")
    return [{key: message[key] for key in kept if key in message} for message in messages]
