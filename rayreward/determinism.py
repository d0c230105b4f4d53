"""G1, one model: compares the actors' fingerprints and reports who differs, and in what.

Works on fingerprints alone; does not know how they were collected, or Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from rayreward.errors import DeterminismError
from rayreward.fingerprint import Environment, Fingerprint

_COMPUTED = (
    "max_batch_tokens",
    "attention",
    "layout",
    "compiled",
    "batch_invariant",
    "derived",
    "probe",
)
"""What follows from model and hardware together."""
_MODEL = tuple(
    field.name for field in fields(Fingerprint) if field.name not in (*_COMPUTED, "environment")
)
_ENVIRONMENT = tuple(field.name for field in fields(Environment))
_HASH_SHOWN = 12
"""Characters of a hash in the printed table: enough to tell two apart by eye."""

Differing = Mapping[str, tuple[object, object]]
"""Name to (an actor's value, the others' value)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """In what an actor differs from the others.

    Attributes:
        actor: Its number.
        model: Weights, tokenizer and settings: the same text would get another reward.
        computed: What the same model comes to on this actor's hardware, the probe above all: the
            same text would get a reward with other last bits.
        environment: What differs between the machines.
    """

    actor: int
    model: Differing
    computed: Differing
    environment: Differing

    def __str__(self) -> str:
        held = ", ".join(_told({**self.model, **self.computed}))
        machine = ", ".join(_told(self.environment))
        where = f"its machine has {machine}" if machine else "its machine looks the same"
        return f"{held}; {where}"


@dataclass(frozen=True, slots=True)
class DeterminismReport:
    """What every actor holds. Prints as a table.

    Attributes:
        fingerprints: By actor number.
        reference: What most actors hold (or what the pool began with).
        differences: One for each actor that differs from the reference in anything.
    """

    fingerprints: Mapping[int, Fingerprint]
    reference: Fingerprint
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> bool:
        """Whether all actors hold the same model and compute the same with it."""
        return self.same_model and not self.other_hardware

    @property
    def same_model(self) -> bool:
        """G1: whether all actors hold the same model."""
        return not self.other_models

    @property
    def other_models(self) -> tuple[Difference, ...]:
        """The actors that hold another model."""
        return tuple(difference for difference in self.differences if difference.model)

    @property
    def other_hardware(self) -> tuple[Difference, ...]:
        """The actors that hold the same model and compute other bits with it."""
        return tuple(d for d in self.differences if d.computed and not d.model)

    def raise_if_different(self, *, accept_hardware: bool = False) -> None:
        """Raises DeterminismError, naming the actors that differ, unless all are alike.

        Args:
            accept_hardware: Let pass what differs on account of hardware alone.
        """
        if self.other_models:
            raise DeterminismError(self._other_models(), self)
        if self.other_hardware and not accept_hardware:
            raise DeterminismError(self._other_hardware(), self)

    def _other_models(self) -> str:
        return (
            f"{len(self.other_models)} of {len(self.fingerprints)} actors hold another model than "
            "the pool's, so the same text would get different rewards:\n"
            f"{_listed(self.other_models)}\n"
            "Use machines with the same packages and hardware. Where the machines are alike, "
            "suspect memory or disk: the files may differ, or a bit may have flipped. Where "
            "machines only draw other bits from one seed, head_sync='broadcast' (--head-sync "
            "broadcast) gives them all the first actor's head."
        )

    def _other_hardware(self) -> str:
        return (
            f"Same weights, other hardware: G2 does not hold across these actors. "
            f"{len(self.other_hardware)} of {len(self.fingerprints)} compute other bits:\n"
            f"{_listed(self.other_hardware)}\n"
            "Use machines that are alike, pool only those that are with mixed_hardware='alike' "
            "(--mixed-hardware alike), or accept with 'accept' that the last bits of a reward "
            "depend on who computes it."
        )

    def __str__(self) -> str:
        header = ["actor", "head", "body", "tokenizer", "dtype", "device", "cpu", "torch", ""]
        odd = {d.actor: "differs" for d in self.other_models}
        odd |= {d.actor: "same weights, other hardware" for d in self.other_hardware}
        rows = [
            [
                str(actor),
                f"{_short(held.head)} ({_called(held.head_origin)})",
                _short(held.body),
                _short(held.tokenizer),
                held.dtype,
                held.environment.device,
                held.environment.cpu,
                held.environment.torch,
                odd.get(actor, "ok"),
            ]
            for actor, held in sorted(self.fingerprints.items())
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join([*lines, *self._agreement(), f"{len(rows)} actors: {self._verdict()}"])

    def _agreement(self) -> list[str]:
        """For each part of a fingerprint whether the actors agree on it."""
        lines = []
        for part, names in (
            ("model", _MODEL),
            ("computed", _COMPUTED),
            ("environment", _ENVIRONMENT),
        ):
            odd = {name for d in self.differences for name in getattr(d, part)}
            told = ", ".join(f"{name} DIFFERS" if name in odd else name for name in names)
            lines.append(f"{part}: {told}")
        return [*lines, f"neighbours: G3 {self.reference.batch_invariant}"]

    def _verdict(self) -> str:
        if self.other_models:
            return f"{len(self.other_models)} of {len(self.fingerprints)} actors differ"
        if self.other_hardware:
            return "same weights, other hardware: G2 does not hold across these actors"
        if self.differences:
            return "identical, on machines that are not (the probe gives the same bits on all)"
        return "identical"


def compare(
    fingerprints: Mapping[int, Fingerprint], reference: Fingerprint | None = None
) -> DeterminismReport:
    """Compares what actors hold.

    Args:
        fingerprints: By actor number, at least one.
        reference: What they must hold. None: what most of them hold; the lowest actor decides
            where nothing is held by more actors than another.
    """
    if reference is None:
        counts = Counter(_held(f) for _, f in sorted(fingerprints.items()))
        majority = counts.most_common(1)[0][0]  # first seen first among equals
        reference = next(f for _, f in sorted(fingerprints.items()) if _held(f) == majority)
    differences = tuple(
        _difference(actor, held, reference)
        for actor, held in sorted(fingerprints.items())
        if held != reference
    )
    return DeterminismReport(dict(fingerprints), reference, differences)


def _held(fingerprint: Fingerprint) -> tuple[object, ...]:
    return tuple(getattr(fingerprint, name) for name in (*_MODEL, *_COMPUTED))


def _difference(actor: int, held: Fingerprint, reference: Fingerprint) -> Difference:
    return Difference(
        actor,
        differing(held, reference, _MODEL),
        differing(held, reference, _COMPUTED),
        differing(held.environment, reference.environment, _ENVIRONMENT),
    )


def differing(mine: object, theirs: object, names: Iterable[str]) -> Differing:
    """Which of some attributes of two objects differ."""
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _listed(differences: Iterable[Difference]) -> str:
    """A line for each actor."""
    return "\n".join(f"  actor {difference.actor}: {difference}" for difference in differences)


def _told(pairs: Differing) -> list[str]:
    return [
        f"probe {_apart(mine, theirs)}"
        if name == "probe"
        else f"{name} {_short(mine)} instead of {_short(theirs)}"
        for name, (mine, theirs) in pairs.items()
    ]


def _apart(mine: object, theirs: object) -> str:
    """How far two probes are from one another."""
    if not (isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs)):
        return "of other texts"
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
    both = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    if len(both) < len(pairs):
        return f"without a reward for {len(pairs) - len(both)} texts"
    return f"{len(pairs)} of {len(mine)} rewards differ, by up to {max(both):.1e}"


def _called(head_origin: str) -> str:
    """A drawn head is called what it is."""
    return "untrained, seeded" if head_origin == "seeded" else head_origin


def _short(value: object) -> str:
    text = str(value)
    is_hash = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:_HASH_SHOWN] if is_hash else text
