"""What is said over HTTP: bodies in the dialects that frameworks speak, and the replies.

Each body says which samples it asks about (`samples`), and makes its reply from what became of
them (`reply`). Does not know HTTP, or pools.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rayreward.preferences import to_sample
from rayreward.types import (
    Failure,
    Outcome,
    Reward,
    Sample,
    TokenIds,
    Verbatim,
    Version,
)

MAX_ITEMS = 1_024
"""Texts in one request."""

Message = dict[str, Any]
Messages = Annotated[list[Message], Len(1, 1_000)]
Some = Len(0, MAX_ITEMS)
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Len(0, 1_000_000)]


class NoReward(Exception):
    """A reward could not be computed, and the dialect knows only numbers."""

    def __init__(self, row: int, failure: Failure) -> None:
        super().__init__(row, failure)
        self.row, self.failure = row, failure


class Body(BaseModel):
    """A request. Fields that it does not know are let pass, as the servers it stands for do."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    def samples(self) -> list[list[Sample]]:
        """What is asked about: groups of texts that begin alike."""
        raise NotImplementedError

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> Any:
        """The answer.

        Args:
            groups: For each group of `samples` its outcomes.
            version: What they come from.

        Raises:
            NoReward: The dialect has no way to say that a reward is missing, and one is.
        """
        raise NotImplementedError


# RayReward's own


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
        weights = Weights(
            number=version.number, model=version.model, head=version.head, body=version.body
        )
        return RewardReply(rewards=answers, version=weights)


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


class Weights(BaseModel):
    """Which weights all rewards of a reply come from."""

    number: int
    model: str
    head: str
    body: str


class RewardReply(BaseModel):
    """N answers, in the order of the items."""

    rewards: list[Answer | Answers]
    version: Weights


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


# vLLM's and SGLang's


_NOT_HONOURED = (
    *("truncate_prompt_tokens", "truncation_side", "dimensions", "chat_template"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
)
"""Fields of those servers that change what the model sees, or what it answers."""


class _Inputs(Body):
    model: str | None = None
    """Echoed: a pool has one model."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_change_the_reward(cls, body: Any) -> Any:
        given = body if isinstance(body, Mapping) else {}
        for name in _NOT_HONOURED:
            if given.get(name) is not None:
                raise ValueError(f"{name} is not supported, and would change the reward")
        return body

    def _reads(self, texts: Any, special: bool) -> list[list[Sample]]:
        """One text, token ids of one, or a list of either."""
        if isinstance(texts, str) or (texts and isinstance(texts[0], int)):
            texts = [texts]
        return [
            [
                Verbatim(text, add_special_tokens=special)
                if isinstance(text, str)
                else TokenIds(tuple(text))
            ]
            for text in texts
        ]


Input = str | Annotated[list[str], Some] | Ids | Annotated[list[Ids], Some]


class ClassifyBody(_Inputs):
    """vLLM's `/classify`: texts or token ids, or messages."""

    input: Input
    use_activation: bool | None = None
    """Null and true: the sigmoid of the reward, as vLLM answers for one label."""
    add_special_tokens: bool = True

    def samples(self) -> list[list[Sample]]:
        return self._reads(self.input, self.add_special_tokens)

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        return _classified(self, groups, version)


class ClassifyMessagesBody(_Inputs):
    """vLLM's `/classify` for one conversation."""

    messages: Messages
    use_activation: bool | None = None

    def samples(self) -> list[list[Sample]]:
        return [[to_sample(self.messages)]]

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        return _classified(self, groups, version)


class SGLangBody(_Inputs):
    """SGLang's native `/classify`; always raw rewards."""

    text: str | Annotated[list[str], Some]

    def samples(self) -> list[list[Sample]]:
        return self._reads(self.text, True)

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> Any:
        answers = [
            {
                "embedding": [reward.value],
                "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": reward.tokens},
            }
            for reward in _rewards(groups)
        ]
        return answers[0] if isinstance(self.text, str) else answers


class EmbeddingsBody(_Inputs):
    """OpenAI's `/v1/embeddings`, as SGLang serves reward models: the embedding is the reward."""

    input: Input
    encoding_format: Literal["float"] = "float"

    def samples(self) -> list[list[Sample]]:
        return self._reads(self.input, True)

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        rewards = _rewards(groups)
        data = [
            {"object": "embedding", "index": row, "embedding": [reward.value]}
            for row, reward in enumerate(rewards)
        ]
        model = self.model or version.model
        return {"object": "list", "data": data, "model": model, "usage": _usage(rewards)}


def _classified(
    body: ClassifyBody | ClassifyMessagesBody,
    groups: Sequence[Sequence[Outcome]],
    version: Version,
) -> dict[str, Any]:
    rewards = _rewards(groups)
    activate = body.use_activation is not False
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or version.model,
        "data": [
            {
                "index": row,
                "label": "LABEL_0",
                "probs": [_sigmoid(reward.value) if activate else reward.value],
                "num_classes": 1,
            }
            for row, reward in enumerate(rewards)
        ],
        "usage": _usage(rewards),
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _usage(rewards: Sequence[Reward]) -> Mapping[str, int]:
    tokens = sum(reward.tokens for reward in rewards)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


# OpenRLHF's and slime's


class OpenRLHFBody(Body):
    """OpenRLHF's `/get_reward`."""

    query: Annotated[list[str], Some]
    """Texts in the policy's template; EOS is added where it is absent."""
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    def samples(self) -> list[list[Sample]]:
        return [[Verbatim(text, ensure_eos=True)] for text in self.query]

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        rewards = [reward.value for reward in _rewards(groups)]
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
        return _rewards(groups)[0].value


def _rewards(groups: Sequence[Sequence[Outcome]]) -> list[Reward]:
    found: list[Reward] = []
    for outcome in (outcome for group in groups for outcome in group):
        if isinstance(outcome, Failure):
            raise NoReward(len(found), outcome)
        found.append(outcome)
    return found
