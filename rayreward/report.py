"""What a finished job says of itself: numbers for programs, a summary for people.

Knows counts and fingerprints; does not know how the work was done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayreward.types import Tally


@dataclass(frozen=True, slots=True)
class JobReport:
    """The outcome of a scoring job. Prints as a summary.

    Attributes:
        output: The output directory.
        tally: Counts over all rows, those of earlier runs included.
        provenance: What the parts' schema metadata says: model, head, settings, versions.
        actors: Actors at work at the end.
        quarantined: Why actors were taken out of work since the pool began; mostly none.
        elapsed_s: Seconds of scoring in this run, model loading not included.
        rows_before: Rows that an earlier run had done.
        tokens_before: Tokens that an earlier run had scored.
        max_failed_rows: Rows without a reward that were declared fine.
        busy_share: Share of the time between the first and the last batch of this run in which the
            models worked; null where nothing was scored.
    """

    output: str
    tally: Tally
    provenance: Mapping[str, Any]
    actors: int
    elapsed_s: float
    rows_before: int
    tokens_before: int
    max_failed_rows: int
    quarantined: tuple[str, ...] = ()
    busy_share: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of pairs whose chosen side has the strictly higher reward; a tie is a miss."""
        return self.tally.wins / self.tally.pairs if self.tally.pairs else None

    @property
    def mean_margin(self) -> float | None:
        """Mean of chosen minus rejected."""
        return self.tally.margin_sum / self.tally.pairs if self.tally.pairs else None

    @property
    def tokens_per_s(self) -> float:
        """Tokens scored in this run per second."""
        scored = self.tally.tokens - self.tokens_before
        return scored / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def too_many_failed(self) -> bool:
        """Whether more rows have no reward than was declared fine."""
        return self.tally.failed_rows > self.max_failed_rows

    def __str__(self) -> str:
        lines = [("rows", self._rows()), ("failed", self._failed())]
        if self.tally.pairs:
            lines += [("accuracy", self._accuracy()), ("mean margin", f"{self.mean_margin:+.6f}")]
        if self.tally.truncated:
            lines.append(("truncated", f"{self.tally.truncated:,} texts"))
        lines += [
            ("tokens", f"{self.tally.tokens:,} ({self.tokens_per_s:,.0f} tokens/s)"),
            (
                "actors",
                f"{self.actors} on {self.provenance['fingerprint']['environment']['device']}",
            ),
            *([] if self.busy_share is None else [("model busy", f"{self.busy_share:.1%}")]),
            *(("quarantined", reason.splitlines()[0]) for reason in self.quarantined),
            ("model", f"{self.provenance['model']} ({self.provenance['fingerprint']['dtype']})"),
            ("head", describe_head(self.provenance)),
            ("neighbours", describe_invariance(self.provenance)),
            ("head sha256", self.provenance["fingerprint"]["head"]),
            ("output", self.output),
        ]
        return "\n".join(f"{name:<12} {text}" for name, text in lines)

    def _rows(self) -> str:
        before = f", {self.rows_before:,} of them by an earlier run" if self.rows_before else ""
        return f"{self.tally.rows:,} in {self.elapsed_s:.1f} s{before}"

    def _failed(self) -> str:
        reasons = ", ".join(f"{n:,} {status}" for status, n in self.tally.failed.items())
        return f"{self.tally.failed_rows:,}" + (f" ({reasons})" if reasons else "")

    def _accuracy(self) -> str:
        tally = self.tally
        return (
            f"{100 * (self.accuracy or 0):.2f} % of {tally.pairs:,} pairs "
            f"({tally.wins:,} won, {tally.ties:,} tied)"
        )


def describe_invariance(provenance: Mapping[str, Any]) -> str:
    """Whether a reward depends on what shares its batch, in plain words."""
    verdict = provenance["fingerprint"]["batch_invariant"]
    holds = "rewards keep every bit in any batch" if verdict == "holds" else "last bits may move"
    return f"G3 {verdict}: {holds}"


def describe_head(provenance: Mapping[str, Any]) -> str:
    """Where the head comes from, in plain words."""
    if provenance["fingerprint"]["head_origin"] == "seeded":
        return f"untrained: drawn from seed {provenance['settings']['seed']}"
    return "trained: loaded from the checkpoint"
