"""Actors in their places: brought up, waited for, replaced, or done without.

A place is a number; an actor that takes a lost one's place takes its number. Who may work is the
gate's to say, and what actors do is the dispatcher's (`rayreward.dispatch`).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from rayreward.errors import DeterminismError, PlacementError, PoolError
from rayreward.events import Fleet, Lost, NotLoaded, NotPlaced

_logger = logging.getLogger("rayreward")


class Roster:
    """Who is there, and who is coming.

    Attributes:
        births: What each live actor said of itself when it was loaded.
        quarantined: Why actors were taken out of work.
        lenient: Whether a place is left empty, while there are others, where no actor can be
            brought up; else that is an error.
    """

    def __init__(
        self, fleet: Fleet, *, num_actors: int, min_actors: int | None, max_attempts: int
    ) -> None:
        """
        Args:
            fleet: The actors.
            num_actors: How many places there are.
            min_actors: As for `Dispatcher`.
            max_attempts: Deaths while loading, or bad actors, in a row in one place.
        """
        self.births: dict[int, Any] = {}
        self.quarantined: list[str] = []
        self.lenient = False
        self._fleet = fleet
        self._num_actors = num_actors
        self._enough = min_actors or num_actors
        self._fewest = min_actors or 1
        self._max_attempts = max_attempts
        self._starting: set[int] = set()
        self._waiting: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._refusals: Counter[int] = Counter()

    @property
    def coming(self) -> list[int]:
        """Actors that find their place, or load their model, at the moment."""
        return sorted(self._starting | self._waiting)

    @property
    def loading(self) -> bool:
        """Whether it is not known of each actor yet if there is room for it now."""
        return bool(self._starting)

    @property
    def enough(self) -> bool:
        """Whether work may begin."""
        return not self._starting or len(self.births) >= self._enough

    def fill(self) -> None:
        """Begins to bring up an actor in each empty place."""
        for actor in range(self._num_actors):
            if actor not in self.births.keys() | self._starting | self._waiting:
                self.start(actor)

    def start(self, actor: int) -> None:
        """Begins to bring up an actor."""
        self._starting.add(actor)
        self._fleet.start(actor)

    def join(self, actor: int, birth: Any) -> None:
        """An actor has its model loaded."""
        self._starting.discard(actor)
        self._waiting.discard(actor)
        self._deaths.pop(actor, None)
        self.births[actor] = birth

    def leave(self, actor: int) -> None:
        """An actor is no more, or works no more."""
        self._waiting.discard(actor)
        self.births.pop(actor, None)

    def forgive(self) -> None:
        """Forgets what went wrong in which place."""
        self._deaths.clear()
        self._refusals.clear()

    def not_admitted(self, actor: int, error: DeterminismError) -> None:
        """An actor was found bad: another takes its place.

        Raises:
            DeterminismError: As many in a row have failed there as may.
        """
        self.quarantined.append(str(error))
        self._refusals[actor] += 1
        if self._refusals[actor] >= self._max_attempts:
            last = DeterminismError(
                f"{error}\n{self._refusals[actor]} actors in this place have failed: replacing "
                "them does not help.",
                error.report,
            )
            self._give_up(actor, last)
        else:
            _logger.warning("actor %d is taken out of work and replaced: %s", actor, error)
            self.start(actor)

    def proven(self, actor: int) -> None:
        """An actor has done work, and is still good: what came before it in its place is past."""
        self._refusals.pop(actor, None)

    def died_loading(self, event: Lost) -> None:
        """An actor died while it was loading its model: another takes its place.

        Raises:
            PoolError: As many have died there as may.
        """
        actor = event.actor
        self._waiting.discard(actor)
        self._deaths[actor] += not event.with_machine
        if self._deaths[actor] >= self._max_attempts:
            self._starting.discard(actor)
            last = PoolError(
                f"Actor {actor} died {self._max_attempts} times while loading the model: "
                f"{event.reason} Look for an out-of-memory kill on its machine."
            )
            self._give_up(actor, last)
        else:
            _logger.warning("actor %d died while loading; starting it again", actor)
            self.start(actor)

    def not_loaded(self, event: NotLoaded) -> None:
        """An actor can't load its model.

        Raises:
            BaseException: Why it can't.
        """
        self._starting.discard(event.actor)
        self._fleet.stop(event.actor)
        self._give_up(event.actor, event.error)

    def not_placed(self, event: NotPlaced) -> None:
        """There is no room for an actor now.

        Raises:
            PlacementError: Too few are left.
        """
        self._starting.discard(event.actor)
        self._waiting.add(event.actor)
        self.go_on_without(event.actor, event.reason)

    def go_on_without(self, actor: int, reason: str) -> None:
        """A place stays empty.

        Raises:
            PlacementError: Too few are left.
        """
        _logger.warning("going on without actor %d: %s", actor, reason)
        if len(self.births) + len(self._starting) < self._fewest:
            raise PlacementError(reason)

    def stop(self) -> None:
        """Ends all actors."""
        for actor in [*self.births, *self._starting, *self._waiting]:
            self._fleet.stop(actor)
        self.births.clear()
        self._starting.clear()
        self._waiting.clear()

    def _give_up(self, actor: int, error: BaseException) -> None:
        """No actor can be brought up in this place."""
        if not (self.lenient and self.births):
            raise error
        _logger.warning("going on without actor %d: %s", actor, error)
