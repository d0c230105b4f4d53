"""The dialects of inference servers: vLLM's and SGLang's, and OpenAI's as SGLang speaks it."""

from __future__ import annotations

import base64
import math
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import Discriminator, Field, Tag, model_validator

from rayreward.items import to_sample
from rayreward.serve.dialects.base import Body, Messages, Some, rewards_of
from rayreward.types import Outcome, Reward, Sample, TokenIds, Verbatim, Version

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Len(0, 1_000_000)]
"""Token ids of one text."""

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
            for reward in rewards_of(groups)
        ]
        return answers[0] if isinstance(self.text, str) else answers


class EmbeddingsBody(_Inputs):
    """OpenAI's `/v1/embeddings`, as SGLang serves reward models: the embedding is the reward."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    """base64: of float32, little-endian, as OpenAI's own client asks for it."""

    def samples(self) -> list[list[Sample]]:
        return self._reads(self.input, True)

    def reply(self, groups: Sequence[Sequence[Outcome]], version: Version) -> dict[str, Any]:
        rewards = rewards_of(groups)
        data = [
            {"object": "embedding", "index": row, "embedding": self._encode(reward.value)}
            for row, reward in enumerate(rewards)
        ]
        model = self.model or version.model
        return {"object": "list", "data": data, "model": model, "usage": _usage(rewards)}

    def _encode(self, reward: float) -> list[float] | str:
        if self.encoding_format == "float":
            return [reward]
        return base64.b64encode(struct.pack("<f", reward)).decode()


def _classified(
    body: ClassifyBody | ClassifyMessagesBody,
    groups: Sequence[Sequence[Outcome]],
    version: Version,
) -> dict[str, Any]:
    rewards = rewards_of(groups)
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


def _dialect(body: Any) -> str:
    """Which of the bodies of `/classify` one is."""
    given = body if isinstance(body, Mapping) else vars(body) if isinstance(body, Body) else {}
    return next((key for key in ("text", "messages") if key in given), "input")


AnyClassifyBody = Annotated[
    Annotated[SGLangBody, Tag("text")]
    | Annotated[ClassifyMessagesBody, Tag("messages")]
    | Annotated[ClassifyBody, Tag("input")],
    Discriminator(_dialect),
]
"""Of `/classify`, which both servers have."""
