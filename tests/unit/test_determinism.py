"""G1, one model: who differs is found and named, whatever the machines look like."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from rayreward.determinism import DeterminismReport, compare
from rayreward.errors import DeterminismError
from rayreward.fingerprint import Environment, Fingerprint

MACHINE = Environment(
    python="3.11.7",
    torch="2.11.0",
    transformers="5.17.0",
    tokenizers="0.22.1",
    cpu="AVX512",
    device="cpu",
)
HELD = Fingerprint(
    head="1" * 64,
    body="2" * 64,
    tokenizer="3" * 64,
    chat_template="4" * 64,
    head_origin="seeded",
    revision="main",
    architecture="LlamaForSequenceClassification",
    dtype="float32",
    max_length=512,
    truncation="left",
    pad_id=0,
    max_batch_tokens=2048,
    attention="sdpa",
    layout="flat",
    compiled=False,
    share_prefixes=True,
    batch_invariant="holds",
    derived="5" * 64,
    probe=(0.5, -0.25, None),
    environment=MACHINE,
)
COMPUTED_FIELDS = [
    "max_batch_tokens",
    "attention",
    "layout",
    "compiled",
    "batch_invariant",
    "derived",
    "probe",
]
MODEL_FIELDS = [
    field.name
    for field in dataclasses.fields(Fingerprint)
    if field.name not in (*COMPUTED_FIELDS, "environment")
]
MACHINE_FIELDS = [field.name for field in dataclasses.fields(Environment)]


def _held(**changes: Any) -> Fingerprint:
    return dataclasses.replace(HELD, **changes)


def _on(**changes: Any) -> Environment:
    return dataclasses.replace(MACHINE, **changes)


def _odd(report: DeterminismReport) -> list[int]:
    return [difference.actor for difference in report.differences]


def _row(report: DeterminismReport, actor: int) -> str:
    """The actor's line of the printed table."""
    (row,) = [line for line in str(report).splitlines() if line.split()[0] == str(actor)][:1]
    return row


def test_determinism_g1_alike_actors_pass() -> None:
    report = compare({0: HELD, 1: _held(), 2: _held()})
    assert report.identical
    assert report.reference == HELD
    report.raise_if_different()
    assert str(report).endswith("3 actors: identical")


def test_determinism_g1_majority_decides() -> None:
    report = compare({0: _held(head="f" * 64), 1: HELD, 2: HELD})
    assert not report.identical
    assert report.reference == HELD
    assert _odd(report) == [0]
    assert report.differences[0].model == {"head": ("f" * 64, "1" * 64)}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_determinism_g1_lowest_actor_decides_a_tie(order: tuple[int, ...]) -> None:
    held = {0: HELD, 1: _held(body="f" * 64), 2: HELD, 3: _held(body="f" * 64)}
    report = compare({actor: held[actor] for actor in order})
    assert report.reference == HELD
    assert _odd(report) == [1, 3]


def test_determinism_g1_a_given_reference_outweighs_the_majority() -> None:
    drifted = _held(body="f" * 64)
    report = compare({0: drifted, 1: drifted, 2: HELD}, HELD)
    assert report.reference is HELD
    assert _odd(report) == [0, 1]
    assert _odd(compare({7: drifted}, HELD)) == [7]
    assert compare({7: HELD}, HELD).identical


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_determinism_g1_every_part_of_the_model_counts(name: str) -> None:
    report = compare({0: HELD, 1: HELD, 2: _held(**{name: "another"})})
    assert _odd(report) == [2]
    assert report.differences[0].model == {name: ("another", getattr(HELD, name))}
    assert report.differences[0].environment == {}


@pytest.mark.parametrize("name", COMPUTED_FIELDS)
def test_determinism_g2_same_weights_on_hardware_that_computes_other_bits(name: str) -> None:
    odd = _held(**{name: "another"}, environment=_on(cpu="AVX2"))
    report = compare({0: HELD, 1: HELD, 2: odd})
    assert report.same_model
    assert not report.identical
    assert [d.actor for d in report.other_hardware] == [2]
    assert list(report.other_hardware[0].computed) == [name]
    report.raise_if_different(accept_hardware=True)
    with pytest.raises(DeterminismError, match="Same weights, other hardware: G2 does not") as e:
        report.raise_if_different()
    assert "its machine has cpu AVX2 instead of AVX512" in str(e.value)
    assert "mixed_hardware='alike'" in str(e.value)
    assert str(report).endswith(
        "same weights, other hardware: G2 does not hold across these actors"
    )
    assert _row(report, 2).endswith("same weights, other hardware")


def test_determinism_error_tells_how_far_probes_are_apart() -> None:
    for probe, told in [
        ((0.5, -0.5, None), "probe 1 of 3 rewards differ, by up to 2.5e-01"),
        ((0.5, None, None), "probe without a reward for 1 texts"),
        ((0.5,), "probe of other texts"),
    ]:
        with pytest.raises(DeterminismError) as caught:
            compare({0: HELD, 1: HELD, 2: _held(probe=probe)}).raise_if_different()
        assert f"  actor 2: {told};" in str(caught.value)


def test_determinism_another_model_is_told_before_other_hardware() -> None:
    held = {0: HELD, 1: HELD, 2: HELD, 3: _held(probe=()), 4: _held(body="f" * 64, probe=())}
    report = compare(held)
    assert [d.actor for d in report.other_models] == [4]
    assert [d.actor for d in report.other_hardware] == [3]
    with pytest.raises(DeterminismError, match="1 of 5 actors hold another model"):
        report.raise_if_different(accept_hardware=True)


def test_determinism_report_says_of_each_part_whether_actors_agree() -> None:
    odd = _held(head="f" * 64, probe=(), environment=_on(torch="3"))
    shown = str(compare({0: HELD, 1: HELD, 2: odd}))
    assert "model: head DIFFERS, body, tokenizer, chat_template, head_origin," in shown
    assert "batch_invariant, derived, probe DIFFERS\n" in shown
    assert "environment: python, torch DIFFERS, transformers" in shown
    assert "neighbours: G3 holds" in shown


@pytest.mark.parametrize("name", MACHINE_FIELDS)
def test_determinism_another_machine_that_computes_the_same_is_let_pass(name: str) -> None:
    report = compare({0: HELD, 1: _held(environment=_on(**{name: "another"}))})
    assert report.identical
    assert list(report.differences[0].environment) == [name]
    report.raise_if_different()
    assert "identical, on machines that are not (the probe" in str(report)


def test_determinism_table_shows_the_machines() -> None:
    machine = _on(torch="2.12.0", cpu="AVX2", device="NVIDIA H100")
    report = compare({0: HELD, 1: _held(environment=machine)})
    assert all(shown in _row(report, 0) for shown in ("2.11.0", "AVX512", "cpu"))
    assert all(shown in _row(report, 1) for shown in ("2.12.0", "AVX2", "NVIDIA H100"))


@pytest.mark.parametrize("name", MACHINE_FIELDS)
def test_determinism_error_says_what_differs_between_the_machines(name: str) -> None:
    odd = _held(head="f" * 64, environment=_on(**{name: "another"}))
    report = compare({0: HELD, 1: HELD, 2: odd})
    assert report.differences[0].environment == {name: ("another", getattr(MACHINE, name))}
    with pytest.raises(DeterminismError) as caught:
        report.raise_if_different()
    shown = f"its machine has {name} another instead of {getattr(MACHINE, name)}"
    assert shown in str(caught.value)


def test_determinism_table_names_the_odd_actor() -> None:
    report = compare({0: HELD, 4: _held(head="f" * 64, head_origin="trained"), 11: HELD})
    assert _row(report, 4).endswith("differs")
    assert "ffffffffffff (trained)" in _row(report, 4)
    assert _row(report, 0).endswith("ok")
    assert _row(report, 11).endswith("ok")
    assert str(report).endswith("3 actors: 1 of 3 actors differ")


def test_determinism_table_is_in_the_order_of_the_actors_and_aligned() -> None:
    report = compare({10: HELD, 9: HELD, 1: HELD})
    header, *rows = str(report).splitlines()[:4]
    assert [int(row.split()[0]) for row in rows] == [1, 9, 10]
    assert {row.index("111111111111 (untrained, seeded)") for row in rows} == {header.index("head")}
    assert "1" * 13 not in str(report)


def test_determinism_error_names_the_odd_actor_and_what_it_holds() -> None:
    report = compare({0: HELD, 1: _held(head="f" * 64, chat_template=None), 2: HELD})
    with pytest.raises(DeterminismError) as caught:
        report.raise_if_different()
    message = str(caught.value)
    assert caught.value.report is report
    assert message.startswith("1 of 3 actors hold another model than the pool's")
    assert (
        "  actor 1: head ffffffffffff instead of 111111111111, "
        "chat_template None instead of 444444444444; its machine looks the same\n"
    ) in message
    assert "Use machines with the same packages and hardware." in message
    assert "actor 0:" not in message


def test_determinism_error_names_every_odd_actor() -> None:
    held = dict.fromkeys(range(5), HELD) | {1: _held(pad_id=9), 3: _held(dtype="bfloat16")}
    with pytest.raises(DeterminismError) as caught:
        compare(held).raise_if_different()
    message = str(caught.value)
    assert message.startswith("2 of 5 actors")
    assert "  actor 1: pad_id 9 instead of 0;" in message
    assert "  actor 3: dtype bfloat16 instead of float32;" in message


def test_determinism_report_keeps_what_it_was_given() -> None:
    held = {0: HELD, 1: HELD}
    report = compare(held)
    held[1] = _held(head="f" * 64)
    assert report.fingerprints[1] == HELD


def test_fingerprint_comes_back_from_json_as_it_was() -> None:
    assert Fingerprint.from_dict(json.loads(json.dumps(HELD.to_dict()))) == HELD
