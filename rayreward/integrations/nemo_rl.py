"""NeMo-RL: an environment whose rewards come from a pool.

    env:
      pool:
        pool: rm

    register_env("pool", "rayreward.integrations.nemo_rl.PoolEnvironment")

Every episode is one turn. NeMo-RL's own types are imported when the first step is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayreward.integrations.pools import PoolClient, turns, values


class PoolEnvironment:
    """Rewards conversations, and ends them. Runs as a Ray actor of NeMo-RL's."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            config: Of the environment: `pool`, the name of one (null: RAYREWARD_POOL has it), and
                `timeout_s`, how long to wait for the rewards of a step (null: for ever).
        """
        settings = dict(config or {})
        self._client = PoolClient(settings.get("pool"), timeout_s=settings.get("timeout_s"))

    def step(self, message_log_batch: Sequence[Sequence[Any]], metadata: Sequence[Any]) -> Any:
        """Rewards each conversation.

        Args:
            message_log_batch: N conversations; a message has `role`, `content`, and token ids,
                which belong to the policy and are not looked at.
            metadata: Of each; handed back as it is.

        Returns:
            NeMo-RL's `EnvironmentReturn`: rewards `(N,)` float32, all episodes terminated.

        Raises:
            NoRewardError: A reward could not be computed.
        """
        import torch
        from nemo_rl.environments.interfaces import EnvironmentReturn

        rewards = values(self._client.ask([turns(log) for log in message_log_batch]))
        count = len(message_log_batch)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in range(count)],
            metadata=list(metadata),
            next_stop_strings=[None] * count,
            rewards=torch.tensor(rewards, dtype=torch.float32),
            terminateds=torch.ones(count, dtype=torch.bool),
            answers=[str(log[-1]["content"]) for log in message_log_batch],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Leaves the batch as it is; the mean reward is its one metric."""
        rewards = batch.get("total_reward")
        return batch, {} if rewards is None else {"mean_reward": float(rewards.float().mean())}

    def shutdown(self) -> None:
        """Nothing to end: the pool is not the environment's."""
