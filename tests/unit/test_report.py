"""report: the numbers of a finished job, and how they are told."""

from __future__ import annotations

from typing import Any

import pytest

from rayreward.report import JobReport, describe_head
from rayreward.types import Tally

HEAD = "c0ffee" + "0" * 58


def _provenance(origin: str = "trained") -> dict[str, Any]:
    return {
        "model": "models/judge",
        "settings": {"seed": 42},
        "fingerprint": {
            "head": HEAD,
            "head_origin": origin,
            "dtype": "bfloat16",
            "batch_invariant": "holds",
            "environment": {"device": "NVIDIA H100"},
        },
    }


def _report(tally: Tally, **changes: Any) -> JobReport:
    settings: dict[str, Any] = {
        "output": "/scored",
        "tally": tally,
        "provenance": _provenance(),
        "actors": 4,
        "elapsed_s": 2.5,
        "rows_before": 0,
        "tokens_before": 0,
        "max_failed_rows": 0,
    }
    return JobReport(**(settings | changes))


def _lines(report: JobReport) -> dict[str, str]:
    """The printed summary, line by line."""
    return {line[:12].rstrip(): line[13:] for line in str(report).splitlines()}


def test_report_counts_a_tie_as_a_miss() -> None:
    report = _report(Tally(rows=8, pairs=8, wins=5, ties=2))
    assert report.accuracy == 0.625
    assert _lines(report)["accuracy"] == "62.50 % of 8 pairs (5 won, 2 tied)"


def test_report_of_nothing_but_ties_has_accuracy_zero() -> None:
    report = _report(Tally(rows=3, pairs=3, ties=3))
    assert report.accuracy == 0.0
    assert _lines(report)["accuracy"] == "0.00 % of 3 pairs (0 won, 3 tied)"


def test_report_accuracy_is_over_pairs_with_both_rewards() -> None:
    report = _report(Tally(rows=10, failed={"too_long": 6}, pairs=4, wins=3, margin_sum=2.0))
    assert report.accuracy == 0.75
    assert report.mean_margin == 0.5


def test_report_without_pairs_has_no_accuracy() -> None:
    report = _report(Tally(rows=3, rewards=3))
    assert report.accuracy is None
    assert report.mean_margin is None
    assert not {"accuracy", "mean margin"} & _lines(report).keys()


@pytest.mark.parametrize(("total", "shown"), [(3.0, "+0.750000"), (-1.0, "-0.250000")])
def test_report_shows_the_sign_of_the_margin(total: float, shown: str) -> None:
    report = _report(Tally(rows=4, pairs=4, margin_sum=total))
    assert _lines(report)["mean margin"] == shown


def test_report_paces_only_the_tokens_of_this_run() -> None:
    report = _report(Tally(rows=2, tokens=9_000), tokens_before=4_000)
    assert report.tokens_per_s == 2_000.0
    assert _lines(report)["tokens"] == "9,000 (2,000 tokens/s)"


def test_report_of_a_run_that_took_no_time_has_no_pace() -> None:
    assert _report(Tally(rows=2, tokens=9), tokens_before=9, elapsed_s=0.0).tokens_per_s == 0.0


def test_report_says_how_many_rows_an_earlier_run_did() -> None:
    assert _lines(_report(Tally(rows=2_000)))["rows"] == "2,000 in 2.5 s"
    resumed = _lines(_report(Tally(rows=2_000), rows_before=1_500))["rows"]
    assert resumed == "2,000 in 2.5 s, 1,500 of them by an earlier run"


def test_report_says_why_rows_failed() -> None:
    report = _report(Tally(rows=3_000, failed={"malformed": 2, "too_long": 1_200}))
    assert _lines(report)["failed"] == "1,202 (2 malformed, 1,200 too_long)"
    assert _lines(_report(Tally(rows=3)))["failed"] == "0"


@pytest.mark.parametrize(("allowed", "too_many"), [(0, True), (2, True), (3, False)])
def test_report_knows_how_many_failures_are_fine(allowed: int, too_many: bool) -> None:
    tally = Tally(rows=9, failed={"empty": 1, "malformed": 2})
    assert _report(tally, max_failed_rows=allowed).too_many_failed is too_many


def test_report_mentions_truncation_where_there_was_some() -> None:
    assert _lines(_report(Tally(rows=1, truncated=1_001)))["truncated"] == "1,001 texts"
    assert "truncated" not in _lines(_report(Tally(rows=1)))


def test_report_prints_the_whole_summary() -> None:
    tally = Tally(rows=2, rewards=4, tokens=100, pairs=2, wins=1, ties=1, margin_sum=0.5)
    assert str(_report(tally)).splitlines() == [
        "rows         2 in 2.5 s",
        "failed       0",
        "accuracy     50.00 % of 2 pairs (1 won, 1 tied)",
        "mean margin  +0.250000",
        "tokens       100 (40 tokens/s)",
        "actors       4 on NVIDIA H100",
        "model        models/judge (bfloat16)",
        "head         trained: loaded from the checkpoint",
        "neighbours   G3 holds: rewards keep every bit in any batch",
        f"head sha256  {HEAD}",
        "output       /scored",
    ]


def test_report_says_in_plain_words_that_a_head_is_untrained() -> None:
    assert describe_head(_provenance("trained")) == "trained: loaded from the checkpoint"
    assert describe_head(_provenance("seeded")) == "untrained: drawn from seed 42"
    seeded = _report(Tally(rows=1), provenance=_provenance("seeded"))
    assert _lines(seeded)["head"] == "untrained: drawn from seed 42"


def test_report_tells_how_much_of_the_time_the_models_worked() -> None:
    assert _lines(_report(Tally(rows=3), busy_share=0.9876))["model busy"] == "98.8%"
    assert "model busy" not in _lines(_report(Tally(rows=3)))
