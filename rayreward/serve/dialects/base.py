"""What every dialect has: a body names its samples, and makes the reply from their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict

from rayreward.types import Failure, Outcome, Reward, Sample, Version

MAX_ITEMS = 1_024
"""Texts in one request."""

Messages = Annotated[list[dict[str, Any]], Len(1, 1_000)]
"""A conversation."""

Some = Len(0, MAX_ITEMS)


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


def rewards_of(groups: Sequence[Sequence[Outcome]]) -> list[Reward]:
    """The rewards one after the other, for a dialect that knows only numbers.

    Raises:
        NoReward: One could not be computed.
    """
    found: list[Reward] = []
    for outcome in (outcome for group in groups for outcome in group):
        if isinstance(outcome, Failure):
            raise NoReward(len(found), outcome)
        found.append(outcome)
    return found
