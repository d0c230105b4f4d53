"""slime: the function for `--custom-rm-path`.

    RAYREWARD_POOL=rm python train.py … --custom-rm-path rayreward.integrations.slime.reward

slime calls it with one sample, or with a list of them. Does not import slime.
"""

from __future__ import annotations

from typing import Any

from rayreward.integrations.pools import PoolClient, values
from rayreward.types import Verbatim

_client = PoolClient()


async def reward(args: Any, sample: Any, **_: Any) -> float | list[float]:
    """Rewards from the pool that RAYREWARD_POOL names.

    Args:
        args: slime's; not needed.
        sample: One sample or a list of them, each with `prompt` and `response`. A prompt is a
            text in the policy's template, which is scored as it is with EOS after the response, or
            messages, which the reward model's own template writes out.

    Returns:
        The reward of the sample, or those of the list.

    Raises:
        NoRewardError: One could not be computed.
    """
    samples = sample if isinstance(sample, list) else [sample]
    rewards = values(await _client.ask_async([_read(one) for one in samples]))
    return rewards if isinstance(sample, list) else rewards[0]


def _read(sample: Any) -> Any:
    if isinstance(sample.prompt, str):
        return Verbatim(sample.prompt + sample.response, ensure_eos=True)
    return {"prompt": sample.prompt, "completion": sample.response}
