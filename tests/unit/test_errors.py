"""errors: one tree with standard bases, and every error survives the way between processes."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest

from rayreward import errors
from rayreward.determinism import DeterminismReport, compare
from rayreward.errors import DeterminismError, Interrupted, PoolError, RayRewardError
from rayreward.fingerprint import Environment, Fingerprint

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, BaseException)
]
PLAIN = [error for error in CLASSES if error not in (DeterminismError, Interrupted)]


def _report() -> DeterminismReport:
    """Two actors that differ in their heads."""
    machine = Environment("3.11", "2.11", "5.17", "0.22", "AVX512", "cpu")
    held = [
        Fingerprint(
            head=head,
            body="b",
            tokenizer="t",
            chat_template=None,
            head_origin="trained",
            revision=None,
            architecture="LlamaForSequenceClassification",
            dtype="float32",
            max_length=None,
            truncation="left",
            pad_id=0,
            max_batch_tokens=2048,
            attention="sdpa",
            layout="flat",
            compiled=False,
            share_prefixes=True,
            batch_invariant="holds",
            derived="d",
            probe=(0.5, None),
            environment=machine,
        )
        for head in ("one", "other")
    ]
    return compare(dict(enumerate(held)))


@pytest.mark.parametrize("error", PLAIN)
def test_errors_keep_class_and_message_through_pickling(error: type[BaseException]) -> None:
    again = pickle.loads(pickle.dumps(error("what happened, and what to do")))
    assert type(again) is error
    assert str(again) == "what happened, and what to do"


@pytest.mark.parametrize("carry", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_determinism_keeps_its_report(carry: Callable[[Any], Any]) -> None:
    report = _report()
    again = carry(DeterminismError("actors differ", report))
    assert type(again) is DeterminismError
    assert str(again) == "actors differ"
    assert again.report == report
    assert str(again.report) == str(report)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_errors_interrupted_keeps_its_signal(signum: int) -> None:
    again = pickle.loads(pickle.dumps(Interrupted(signum)))
    assert type(again) is Interrupted
    assert again.signum == signum


def test_errors_interrupted_passes_by_except_exception() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)
    assert not issubclass(Interrupted, RayRewardError)


@pytest.mark.parametrize("error", [error for error in CLASSES if error is not Interrupted])
def test_errors_are_all_of_one_tree(error: type[BaseException]) -> None:
    assert issubclass(error, RayRewardError)


@pytest.mark.parametrize(
    ("name", "bases"),
    [
        ("ConfigError", (ValueError,)),
        ("ModelError", (ValueError,)),
        ("DataError", (ValueError,)),
        ("OutputError", (RuntimeError,)),
        ("PoolError", (RuntimeError,)),
        ("PlacementError", (PoolError, RuntimeError)),
        ("DeterminismError", (PoolError, RuntimeError)),
        ("PoolClosedError", (PoolError, RuntimeError)),
    ],
)
def test_errors_have_standard_bases(name: str, bases: tuple[type, ...]) -> None:
    assert all(issubclass(getattr(errors, name), base) for base in bases)


def test_errors_are_all_drawn_in_the_tree() -> None:
    drawn = errors.__doc__ or ""
    assert [error.__name__ for error in CLASSES if error.__name__ not in drawn] == []
