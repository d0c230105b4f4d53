"""G1, one model: compares the actors' fingerprints and reports who differs.

Works on fingerprints alone; does not know how they were collected, or Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from rayreward.errors import DeterminismError
from rayreward.fingerprint import Environment, Fingerprint

_MODEL = tuple(field.name for field in fields(Fingerprint) if field.name != "environment")
_ENVIRONMENT = tuple(field.name for field in fields(Environment))
_HASH_SHOWN = 12
"""Characters of a hash in the printed table: enough to tell two apart by eye."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What an actor holds otherwise than the others.

    Attributes:
        actor: Its number.
        model: Differing parts of the model, as name to (its value, the others' value).
        environment: The same for the machine it runs on.
    """

    actor: int
    model: Mapping[str, tuple[object, object]]
    environment: Mapping[str, tuple[object, object]]


@dataclass(frozen=True, slots=True)
class DeterminismReport:
    """What every actor holds. Prints as a table.

    Attributes:
        fingerprints: By actor number.
        reference: What most actors hold (or what the pool began with).
        differences: One for each actor that holds another model.
    """

    fingerprints: Mapping[int, Fingerprint]
    reference: Fingerprint
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> bool:
        """Whether all actors hold the same model."""
        return not self.differences

    def raise_if_different(self) -> None:
        """Raises DeterminismError, naming the actors that differ, unless all are alike."""
        if self.differences:
            raise DeterminismError(self._message(), self)

    def _message(self) -> str:
        lines = [
            f"{len(self.differences)} of {len(self.fingerprints)} actors hold another model than "
            "the pool's, so the same text would get different rewards:"
        ]
        for difference in self.differences:
            held = ", ".join(
                f"{name} {_short(mine)} instead of {_short(theirs)}"
                for name, (mine, theirs) in difference.model.items()
            )
            machine = ", ".join(
                f"{name} {mine} instead of {theirs}"
                for name, (mine, theirs) in difference.environment.items()
            )
            where = f"its machine has {machine}" if machine else "its machine looks the same"
            lines.append(f"  actor {difference.actor}: {held}; {where}")
        lines.append(
            "Use machines with the same packages and hardware. Where the machines are alike, "
            "suspect memory or disk: the files may differ, or a bit may have flipped."
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        header = ["actor", "head", "body", "tokenizer", "dtype", "device", "cpu", "torch", ""]
        odd = {difference.actor for difference in self.differences}
        rows = [
            [
                str(actor),
                f"{_short(held.head)} ({held.head_origin})",
                _short(held.body),
                _short(held.tokenizer),
                held.dtype,
                held.environment.device,
                held.environment.cpu,
                held.environment.torch,
                "differs" if actor in odd else "ok",
            ]
            for actor, held in sorted(self.fingerprints.items())
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        verdict = "identical" if self.identical else f"{len(odd)} of {len(rows)} actors differ"
        return "\n".join([*lines, f"{len(rows)} actors: {verdict}"])


def compare(
    fingerprints: Mapping[int, Fingerprint], reference: Fingerprint | None = None
) -> DeterminismReport:
    """Compares what actors hold.

    Args:
        fingerprints: By actor number, at least one.
        reference: What they must hold. None: what most of them hold; the lowest actor decides
            where no model has more actors than another.
    """
    if reference is None:
        counts = Counter(_model(held) for _, held in sorted(fingerprints.items()))
        majority = counts.most_common(1)[0][0]  # first seen first among equals
        reference = next(f for _, f in sorted(fingerprints.items()) if _model(f) == majority)
    differences = tuple(
        _difference(actor, held, reference)
        for actor, held in sorted(fingerprints.items())
        if _model(held) != _model(reference)
    )
    return DeterminismReport(dict(fingerprints), reference, differences)


def _model(held: Fingerprint) -> tuple[object, ...]:
    return tuple(getattr(held, name) for name in _MODEL)


def _difference(actor: int, held: Fingerprint, reference: Fingerprint) -> Difference:
    return Difference(
        actor,
        _differing(held, reference, _MODEL),
        _differing(held.environment, reference.environment, _ENVIRONMENT),
    )


def _differing(
    mine: object, theirs: object, names: tuple[str, ...]
) -> dict[str, tuple[object, object]]:
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _short(value: object) -> str:
    text = str(value)
    is_hash = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:_HASH_SHOWN] if is_hash else text
