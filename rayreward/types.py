"""Frozen values that cross the borders between modules.

They hold data and answer simple questions about it; nothing here reads files, loads models or
talks to Ray.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayreward.meter import ModelTime

Message = Mapping[str, Any]
"""One turn of a conversation: `role`, `content` and whatever else the chat template reads."""


class Status(enum.StrEnum):
    """Why a row has its reward, or why it has none. Written to the `reward_status` column."""

    OK = "ok"
    EMPTY = "empty"
    """There was no token to score."""
    TOO_LONG = "too_long"
    """More tokens than `max_length`, and `truncation="error-row"`."""
    MALFORMED = "malformed"
    """The row is not what its columns promise: a null, a wrong type, bytes that are not UTF-8."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device has not enough memory for the text, even alone."""
    NOT_FINITE = "not_finite"
    """The model answered with NaN or an infinity."""
    POISON = "poison"
    """Actors died over the row, again and again, though they did nothing else."""
    UNREADABLE = "unreadable"
    """The part of the input file that holds the row is damaged."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A reward that could not be computed, and why."""

    status: Status
    detail: str
    tokens: int | None = None
    """Tokens of the text, where it got so far as to be counted."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: a prompt, possibly empty, and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the model's own chat template."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text that somebody else has written out, in a chat template, say: tokenized as it is.

    Attributes:
        text: With its special tokens written out.
        add_special_tokens: Whether the tokenizer adds those that it puts around a text.
        ensure_eos: Whether the text gets the EOS token where it does not end with it.
    """

    text: str
    add_special_tokens: bool = False
    ensure_eos: bool = False


@dataclass(frozen=True, slots=True)
class TokenIds:
    """What the model is to see, in the ids of its own tokenizer."""

    ids: tuple[int, ...]


Sample = Text | Conversation | Verbatim | TokenIds | Failure
"""What gets one reward, or the reason why it won't."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one sample, as the model sees them."""

    ids: tuple[int, ...]
    original_length: int
    """Tokens before truncation; equal to `len(ids)` where nothing was cut."""

    @property
    def truncated(self) -> bool:
        """Whether some of the text was cut off to fit."""
        return self.original_length > len(self.ids)


@dataclass(frozen=True, slots=True)
class Branch:
    """A text in a batch, which may begin as the one before it does.

    Attributes:
        ids: Its token ids, at least one.
        shared: How many of them, from the first on, it has in common with the text before it in
            the batch, so that they are not computed again.
    """

    ids: tuple[int, ...]
    shared: int = 0

    @property
    def own(self) -> int:
        """Tokens that are computed for it."""
        return len(self.ids) - self.shared


@dataclass(frozen=True, slots=True)
class Reward:
    """The outcome for one sample."""

    value: float
    """The reward, finite."""

    tokens: int
    """Tokens that the model was given."""

    truncated: bool
    """Whether some of the text was cut off to fit."""


Outcome = Reward | Failure
"""What became of one sample."""


@dataclass(frozen=True, slots=True)
class Version:
    """Which weights a pool scores with, or a reward comes from.

    Attributes:
        number: 1 for those that the pool began with; grows with each update.
        model: The checkpoint.
        head: Hash of the head's weights.
        body: Hash of the other weights.
    """

    number: int
    model: str
    head: str
    body: str


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over rows, added up shard by shard.

    `margin_sum` is over pairs with both rewards, in float64 and in row order.
    """

    rows: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    """Rows without a reward, by status."""
    rewards: int = 0
    tokens: int = 0
    truncated: int = 0
    pairs: int = 0
    """Pairs with both rewards."""
    wins: int = 0
    """Pairs whose chosen side has the higher reward."""
    ties: int = 0
    margin_sum: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        statuses = sorted({*self.failed, *other.failed})
        added = {s: self.failed.get(s, 0) + other.failed.get(s, 0) for s in statuses}
        return Tally(
            rows=self.rows + other.rows,
            failed=added,
            rewards=self.rewards + other.rewards,
            tokens=self.tokens + other.tokens,
            truncated=self.truncated + other.truncated,
            pairs=self.pairs + other.pairs,
            wins=self.wins + other.wins,
            ties=self.ties + other.ties,
            margin_sum=self.margin_sum + other.margin_sum,
        )

    @property
    def failed_rows(self) -> int:
        """Rows without a reward, or lacking one of theirs."""
        return sum(self.failed.values())


@dataclass(frozen=True, slots=True)
class Attempt:
    """A finished try at a shard: a file beside the output that is no part of it yet."""

    shard: int
    path: str
    size_bytes: int
    sha256: str
    tally: Tally
    time_spent: ModelTime = field(default_factory=ModelTime)
