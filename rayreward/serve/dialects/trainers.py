"""The dialects of trainers: OpenRLHF's and slime's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from rayreward.items import to_sample
from rayreward.serve.dialects.base import Body, Messages, Some, rewards_of
from rayreward.types import Outcome, Sample, Verbatim, Version


class OpenRLHFBody(Body):
    """OpenRLHF's `/get_reward`."""

    query: Annotated[list[str], Some]
    """Texts in the policy's template; EOS is added where it is absent."""
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    def samples(self) -> list[list[Sample]]:
        return [[Verbatim(text, ensure_eos=True)] for text in self.query]

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        rewards = [reward.value for reward in rewards_of(groups)]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


class SlimeBody(Body):
    """slime's `remote_rm`: the whole reply is the reward."""

    prompt: str | Messages
    response: str
    label: Any = None

    def samples(self) -> list[list[Sample]]:
        if isinstance(self.prompt, str):
            return [[Verbatim(self.prompt + self.response, ensure_eos=True)]]
        return [[to_sample({"prompt": self.prompt, "completion": self.response})]]

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> float:
        return rewards_of(groups)[0].value
