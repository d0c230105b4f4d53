"""What a dispatcher and a fleet of actors tell each other, and who may stand on either side.

Values and protocols; does not know Ray, or what is done about an event.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

PROVE = "prove"
"""The actor method whose result is a proof."""


@dataclass(frozen=True, slots=True)
class Task:
    """A call of one actor method. `key` is unique within a run, `name` is for messages."""

    key: Hashable
    name: str
    method: str
    args: tuple[Any, ...] = ()

    @property
    def is_proof(self) -> bool:
        """Whether it does nothing but look at the weights."""
        return self.method == PROVE


@dataclass(frozen=True, slots=True)
class Born:
    """An actor has its model loaded; `birth` is what it says of itself."""

    actor: int
    birth: Any


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """The cluster has found no room for an actor in time. It may yet, and `Born` follow."""

    actor: int
    reason: str


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """An actor could not load its model; another try would end the same."""

    actor: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """An actor died, with everything handed to it.

    Attributes:
        actor: Its number.
        reason: What is known of it, in words.
        with_machine: Whether its machine went, taken back or broken: no fault of what it did.
    """

    actor: int
    reason: str
    with_machine: bool = False


@dataclass(frozen=True, slots=True)
class Alive:
    """A busy actor has answered.

    Attributes:
        actor: Its number.
        count: Grows as it gets on with its work.
    """

    actor: int
    count: int


@dataclass(frozen=True, slots=True)
class Done:
    """A task has its result.

    `proof`, where there is one, says what the actor held after that; else it has not looked. It
    proves what the same actor had done by `looked_s`, which may leave out what it did beside.

    Attributes:
        ticket: From `Fleet.submit`.
        value: What the method returned.
        proof: What the gate can confirm, or null.
        done_s: When the task was done, by the actor's clock.
        looked_s: When the actor looked, by the same clock.
    """

    ticket: Any
    value: Any
    proof: Any = None
    done_s: float = 0.0
    looked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """A task raised an error of its own; the actor lives."""

    ticket: Any
    error: BaseException


Event = Born | NotPlaced | NotLoaded | Lost | Alive | Done | Failed


class Fleet(Protocol):
    """The border to the actors."""

    def start(self, actor: int) -> None:
        """Begins to bring up an actor; `Born`, `NotPlaced`, `NotLoaded` or `Lost` will follow."""

    def submit(self, actor: int, task: Task) -> Any:
        """Calls an actor's method; returns a ticket that `Done` or `Failed` will carry."""

    def wait(self, timeout_s: float) -> list[Event]:
        """What has happened, waiting at most so long for the first event."""

    def forget(self, ticket: Any) -> None:
        """Drops a ticket: no event will come for it, though the actor may go on with its work."""

    def stop(self, actor: int) -> None:
        """Ends an actor and forgets everything handed to it."""


class Gate(Protocol):
    """Decides who may work."""

    def admit(self, actor: int, birth: Any) -> bool:
        """Whether an actor that was just born may work; if not, it is not replaced.

        Raises:
            DeterminismError: It may not, and is to be replaced.
        """

    def confirm(self, actor: int, proof: Any) -> None:
        """Looks at a working actor's proof.

        Raises:
            DeterminismError: It is not what it was: what it did since its last proof is void.
        """
