"""Who may work: an actor that holds the pool's model, and computes the same with it.

Knows fingerprints and what the settings make of their differences; does not know how actors are
brought up, stopped or replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from rayreward.determinism import DeterminismReport, compare
from rayreward.errors import DeterminismError
from rayreward.fingerprint import Fingerprint, Proof

if TYPE_CHECKING:
    from rayreward.actor import Birth

_logger = logging.getLogger("rayreward")

MixedHardware = Literal["refuse", "alike", "accept"]


class Admission:
    """Compares every actor with what the pool began with. Implements `rayreward.dispatch.Gate`.

    Until `settle` has found what that is, everybody is let in.
    """

    def __init__(self, mixed_hardware: MixedHardware) -> None:
        """
        Args:
            mixed_hardware: As in `PoolConfig`.
        """
        self._reference: Fingerprint | None = None
        self._mixed = mixed_hardware
        self._held: dict[int, Fingerprint] = {}
        self._sound_at: dict[int, datetime] = {}

    @property
    def reference(self) -> Fingerprint:
        """What an actor must hold."""
        assert self._reference is not None, "settle() comes first"
        return self._reference

    def settle(self, births: Mapping[int, Birth]) -> None:
        """Makes what most of the first actors hold the pool's model.

        Raises:
            DeterminismError: Some compute other bits, and the settings do not say what to do.
        """
        report = compare({actor: birth.fingerprint for actor, birth in births.items()})
        if not report.other_models and self._mixed == "refuse":
            report.raise_if_different()  # a replacement would find the same hardware
        self._reference = report.reference

    def begin_again(self, reference: Fingerprint) -> None:
        """Makes another model the pool's: every actor is to be admitted anew."""
        self._reference = reference
        self._held.clear()
        self._sound_at.clear()

    def admit(self, actor: int, birth: Birth) -> bool:
        """Decides about an actor that has loaded its model.

        Returns:
            Whether it may work. False: it is not wanted, and needs no replacement.

        Raises:
            DeterminismError: It must not work, and another should take its place.
        """
        if self._reference is not None:
            report = self.report({actor: birth.fingerprint})
            if report.other_hardware and self._mixed == "alike":
                _logger.warning("actor %d is not like the others:\n%s", actor, report)
                return False
            report.raise_if_different(accept_hardware=self._mixed == "accept")
        self._held[actor] = birth.fingerprint
        self._sound_at[actor] = datetime.now()
        return True

    def confirm(self, actor: int, proof: Proof) -> None:
        """Checks that a working actor still holds and computes what it did when it was admitted.

        Raises:
            DeterminismError: It does not.
        """
        then = self._held[actor]
        now = replace(then, **{name: getattr(proof, name) for name in Proof.__slots__})
        report = compare({actor: now}, then)
        if not report.identical:
            raise DeterminismError(_changed(report, self._sound_at[actor]), report)
        self._sound_at[actor] = datetime.now()

    def report(self, fingerprints: Mapping[int, Fingerprint]) -> DeterminismReport:
        """Compares what actors hold now with what the pool began with."""
        return compare(fingerprints, self.reference)


def _changed(report: DeterminismReport, sound_at: datetime) -> str:
    [difference] = report.differences
    parts = ", ".join({**difference.model, **difference.computed})
    return (
        f"Actor {difference.actor} has changed while it worked: {parts} is not what it was at "
        f"{sound_at:%H:%M:%S}, when it was last found sound. Suspect its memory or its device, or "
        "code that writes to the model's weights. Rewards that an earlier call returned since then "
        "may be wrong; what is being scored now is done again."
    )
