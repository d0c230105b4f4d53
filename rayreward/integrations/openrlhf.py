r"""OpenRLHF: the file with a `reward_func`, for `--reward.remote_url`.

    export RAYREWARD_POOL=rm
    python -m openrlhf.cli.train_ppo_ray … \
        --reward.remote_url "$(python -m rayreward.integrations.openrlhf)"

OpenRLHF loads this file by its path, in each of its rollout workers, and calls the function from
threads. Does not import OpenRLHF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayreward.integrations.pools import PoolClient, values
from rayreward.types import Verbatim

_client = PoolClient()


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any
) -> dict[str, Any]:
    """Rewards from the pool that RAYREWARD_POOL names.

    Args:
        queries: N texts, each a prompt and what the policy made of it, with special tokens in the
            policy's template. They are scored as they are, with EOS where it is absent, as
            OpenRLHF's own reward server does.
        prompts: Not needed.
        labels: Not needed.

    Returns:
        `rewards` and `scores`, both `(N,)` float32 tensors, and no `extra_logs`.

    Raises:
        NoRewardError: One could not be computed. OpenRLHF logs it, and goes on without a reward.
    """
    import torch

    outcomes = _client.ask(Verbatim(query, ensure_eos=True) for query in queries)
    rewards = torch.tensor(values(outcomes), dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


if __name__ == "__main__":
    print(__file__)
