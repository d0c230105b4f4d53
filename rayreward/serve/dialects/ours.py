"""RayReward's own dialect: texts, conversations and groups, answered with reasons and a version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict

from rayreward.items import to_sample
from rayreward.serve.dialects.base import MAX_ITEMS, Body, Messages, Some
from rayreward.types import Outcome, Reward, Sample, Version


class Prompted(BaseModel):
    """A prompt and one completion, each a text or messages."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | Messages
    completion: str | Messages


class Completions(BaseModel):
    """A prompt and several completions, each a text or messages."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | Messages
    completions: Annotated[list[str | Messages], Len(1, MAX_ITEMS)]


class Talk(BaseModel):
    """A whole conversation, and what its chat template is told."""

    model_config = ConfigDict(extra="forbid")

    messages: Messages
    tools: list[dict[str, Any]] | None = None


class RewardBody(Body):
    """Texts, conversations and groups of completions."""

    model_config = ConfigDict(extra="forbid")

    items: Annotated[list[str | Messages | Prompted | Completions | Talk], Some]
    """N things to reward; each is a text, a list of messages, or an object of one of the kinds."""

    def samples(self) -> list[list[Sample]]:
        return [list(_samples(item)) for item in self.items]

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> RewardReply:
        answers: list[Answer | Answers] = [
            Answers(completions=[_answer(outcome) for outcome in group])
            if isinstance(item, Completions)
            else _answer(group[0])
            for item, group in zip(self.items, groups, strict=True)
        ]
        return RewardReply(rewards=answers, version=version)


class Answer(BaseModel):
    """The reward of one text, or why it has none."""

    reward: float | None
    status: str
    """`ok`, or why there is no reward: as in the column `reward_status` of a job's output."""
    detail: str | None = None
    tokens: int | None = None
    truncated: bool = False


class Answers(BaseModel):
    """Those of the completions of one prompt."""

    completions: list[Answer]


class RewardReply(BaseModel):
    """N answers, in the order of the items."""

    rewards: list[Answer | Answers]
    version: Version
    """Which weights all of them come from."""


def _samples(item: Any) -> Iterator[Sample]:
    if isinstance(item, Completions):
        for completion in item.completions:
            yield to_sample({"prompt": item.prompt, "completion": completion})
    elif isinstance(item, BaseModel):
        yield to_sample(item.model_dump(exclude_none=True))
    else:
        yield to_sample(item)


def _answer(outcome: Outcome) -> Answer:
    if isinstance(outcome, Reward):
        return Answer(
            reward=outcome.value, status="ok", tokens=outcome.tokens, truncated=outcome.truncated
        )
    return Answer(
        reward=None, status=str(outcome.status), detail=outcome.detail, tokens=outcome.tokens
    )
