"""SkyRL: an environment of one turn, rewarded by a pool.

    skyrl_gym.register(id="pool", entry_point="rayreward.integrations.skyrl:PoolEnv")

and `env_class: pool` in the dataset, `environment.skyrl_gym.pool.pool=rm` in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from rayreward.integrations.pools import PoolClient, turns, values

_find_client = cache(PoolClient)
"""SkyRL makes an environment for each trajectory; they share what finds the pool."""


class PoolEnv(BaseTextEnv):  # type: ignore[misc]
    """Rewards the answer to a prompt, and ends."""

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            env_config: Its `pool` is the name of one. Null: RAYREWARD_POOL has it.
            extras: The row's other columns; not needed.
        """
        super().__init__()
        held = isinstance(env_config, Mapping)
        pool = env_config.get("pool") if held else getattr(env_config, "pool", None)
        self._client = _find_client(pool)
        self._prompt: list[dict[str, Any]] = []

    def init(
        self, prompt: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Takes the prompt, a list of messages."""
        self._prompt = turns(prompt)
        return self._prompt, {}

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Rewards the answer.

        Raises:
            NoRewardError: The reward could not be computed.
        """
        [reward] = values(self._client.ask([{"prompt": self._prompt, "completion": action}]))
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
