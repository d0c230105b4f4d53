"""verl: an asynchronous `compute_score`, for `reward.custom_reward_function`.

    reward.custom_reward_function.path=pkg://rayreward.integrations.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.pool=rm

verl calls it once for each response, all of them at one time; the pool scores them together. Does
not import verl.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from rayreward.errors import DataError
from rayreward.integrations.pools import PoolClient, values

PROMPT_KEYS = ("prompt", "raw_prompt", "question")
"""Where the prompt is looked for in `extra_info`."""

_find_client = cache(PoolClient)


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    pool: str | None = None,
    prompt_key: str | None = None,
    **_: Any,
) -> dict[str, float]:
    """The reward of one response.

    Args:
        data_source: Of the row; not needed.
        solution_str: The response.
        ground_truth: Not needed.
        extra_info: Of the row: its prompt is in here, a text or messages.
        pool: Name of the pool. Null: the environment variable RAYREWARD_POOL has it.
        prompt_key: Where the prompt is in `extra_info`. Null: the first of `PROMPT_KEYS`.

    Returns:
        `score`, always and alone.

    Raises:
        DataError: `extra_info` has no prompt.
        NoRewardError: The reward could not be computed.
    """
    info = extra_info or {}
    keys = [prompt_key] if prompt_key else [key for key in PROMPT_KEYS if key in info]
    prompt = info.get(keys[0]) if keys else None
    if prompt is None:
        raise DataError(
            f"A row of {data_source!r} has no prompt in extra_info, which has {sorted(info)}: add "
            f"it to the dataset there as {prompt_key or PROMPT_KEYS[0]!r}, or say where it is with "
            "reward_kwargs.prompt_key."
        )
    record = {"prompt": _plain(prompt), "completion": solution_str}
    [reward] = values(await _find_client(pool).ask_async([record]))
    return {"score": reward}


def _plain(prompt: Any) -> Any:
    """A text, or a list of messages where verl holds them in a numpy array."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
