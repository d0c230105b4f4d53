"""G1, one model: an actor that holds or computes something else is found, named and replaced."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import parts

from rayreward import DeterminismError, RewardPool
from rayreward.fleet import RayFleet
from rayreward.writing import OutputDirectory

pytestmark = pytest.mark.ray

TEXTS = [f"Answer {n}: " + "the weather is fine. " * (n % 7) for n in range(200)]
TWO: Any = {"seed": 42, "num_actors": 2, "num_cpus_per_actor": 0.5}
REFUSE = {**TWO, "max_attempts": 1}
"""Nothing is tried again."""

AGAIN = {**TWO, "max_attempts": 2}
"""Once more."""


def kill(pool: RewardPool, actor: int) -> None:
    os.kill(pool._engine.dispatcher.births[actor].pid, signal.SIGKILL)


def flip_in_head(actor: Any) -> None:
    """Flips the lowest bit of one weight."""
    import torch

    head = actor._scorer._model.head.tensors["score.weight"]
    head.view(torch.int32)[0, 3] ^= 1


def flip_in_body(actor: Any) -> None:
    from tiny import flip_one_bit

    flip_one_bit(actor._scorer._model._module.model.layers[1].mlp.down_proj)


def start_with(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[RayFleet, int], None]
) -> list[int]:
    """Lets `change` meddle with the fleet before each actor's start; returns who was started."""
    start, started = RayFleet.start, []

    def start_otherwise(self: RayFleet, actor: int) -> None:
        started.append(actor)
        change(self, actor)
        start(self, actor)

    monkeypatch.setattr(RayFleet, "start", start_otherwise)
    return started


def other_seed_for(wrong: Callable[[int], bool]) -> Callable[[RayFleet, int], None]:
    """Another seed for some actors, as if their machines drew other bits."""

    def change(fleet: RayFleet, actor: int) -> None:
        fleet.model = dataclasses.replace(fleet.model, seed=43 if wrong(actor) else 42)

    return change


def test_g1_verify_reports_identical_actors_as_a_table(pool: RewardPool) -> None:
    report = pool.verify()
    assert report.identical
    assert sorted(report.fingerprints) == [0, 1]
    assert "2 actors: identical" in str(report)
    assert report.reference == pool.fingerprint


@pytest.mark.parametrize(("flip", "part"), [(flip_in_head, "head"), (flip_in_body, "body")])
def test_g1_verify_names_and_replaces_the_actor_with_one_flipped_bit(
    ray_cluster: Any, mortal: RewardPool, flip: Any, part: str
) -> None:
    ray_cluster.get(mortal.actors[1].__ray_call__.remote(flip))
    with pytest.raises(DeterminismError, match=rf"1 of 2 actors.*\n  actor 1: {part}") as caught:
        mortal.verify()
    assert sorted(mortal.verify().fingerprints) == [0, 1]
    [difference] = caught.value.report.differences
    assert difference.actor == 1
    assert list(difference.model) == [part]
    assert "differs" in str(caught.value.report)


def test_g1_replacement_that_holds_another_model_gets_no_work(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    """The checkpoint changes on disk while the pool is up; the replacement loads the new one."""
    from tiny import make_checkpoint

    shutil.copytree(tiny_model, tmp_path / "model")
    with RewardPool(str(tmp_path / "model"), **{**AGAIN, "num_actors": 1}) as pool:
        make_checkpoint(tmp_path / "model", weights_seed=2)
        kill(pool, 0)
        with pytest.raises(DeterminismError, match=r"actor 0: body.*\n.*\n2 actors in this place"):
            pool.score(TEXTS)


def test_g1_start_replaces_an_actor_that_differs(
    ray_cluster: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [True]
    change = other_seed_for(lambda actor: actor == 1 and bool(first and first.pop()))
    started = start_with(monkeypatch, change)
    with RewardPool(tiny_model, **TWO) as pool:
        assert pool.verify().identical
        assert pool._engine.dispatcher.actors == [0, 1]
        assert "actor 1: head" in pool._engine.dispatcher.quarantined[0]
    assert started == [0, 1, 1]


def test_g1_start_gives_up_where_replacing_does_not_help(
    ray_cluster: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start_with(monkeypatch, other_seed_for(lambda actor: actor == 1))
    with pytest.raises(DeterminismError, match=r"actor 1: head(.|\n)*replacing them does not help"):
        RewardPool(tiny_model, **AGAIN)
    assert started == [0, 1, 1]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough that kernels for other processors sum, and draw, in another order."""
    from tiny import make_checkpoint

    path = tmp_path_factory.mktemp("models") / "wide"
    return str(make_checkpoint(path, shape={"hidden_size": 576, "intermediate_size": 1024}))


@pytest.fixture
def unlike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actor 1's torch uses no vector instructions, as on another processor."""

    def change(fleet: RayFleet, actor: int) -> None:
        variables = {"ATEN_CPU_CAPABILITY": "default"} if actor == 1 else {}
        fleet._options["runtime_env"] = {"env_vars": variables}  # type: ignore[assignment]

    start_with(monkeypatch, change)


def test_g1_machines_that_draw_other_bits_are_refused(
    ray_cluster: Any, wide_model: str, unlike: None
) -> None:
    with pytest.raises(DeterminismError, match=r"actor 1: head .* its machine has cpu ") as caught:
        RewardPool(wide_model, **REFUSE)
    assert "head_sync='broadcast'" in str(caught.value)
    [difference] = caught.value.report.differences
    assert list(difference.model) == ["head"]
    assert difference.environment["cpu"][0] == "DEFAULT"


def test_g1_broadcast_gives_all_actors_one_head(
    ray_cluster: Any, wide_model: str, unlike: None
) -> None:
    """The head is one then; what the machines compute with it still is not, and that is told."""
    settings: Any = {"head_sync": "broadcast", "mixed_hardware": "accept", **TWO}
    with RewardPool(wide_model, **settings) as pool:
        report = pool.verify()
        assert report.same_model
        [difference] = report.differences
        assert difference.model == {}
        assert set(difference.computed) == {"derived", "probe"}
        with pytest.raises(DeterminismError, match="Same weights, other hardware"):
            report.raise_if_different()
        assert len({held.head for held in report.fingerprints.values()}) == 1
        assert report.fingerprints[1].environment.cpu == "DEFAULT"
        kill(pool, 1)
        assert pool.score(TEXTS).size == len(TEXTS)
        after = pool.verify()  # waits for the replacement, which holds the same head
        assert after.fingerprints == report.fingerprints


def test_g1_only_like_actors_are_pooled_where_that_is_asked_for(
    ray_cluster: Any, wide_model: str, unlike: None
) -> None:
    settings: Any = {"head_sync": "broadcast", "mixed_hardware": "alike", **TWO}
    with RewardPool(wide_model, **settings) as pool:
        assert sorted(pool.verify().fingerprints) == [0]
        assert pool.verify().identical


def test_g1_trained_head_is_never_overwritten_by_another_actors(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that differs on one machine has to show."""
    from tiny import make_checkpoint

    good = make_checkpoint(tmp_path / "good", head=True)
    bad = make_checkpoint(tmp_path / "bad", head=True, weights_seed=2)

    def change(fleet: RayFleet, actor: int) -> None:
        fleet.model = dataclasses.replace(fleet.model, model=str(bad if actor == 1 else good))

    start_with(monkeypatch, change)
    with pytest.raises(DeterminismError, match="actor 1: head"):
        RewardPool(str(good), head_sync="broadcast", **{**REFUSE, "seed": None})


def test_g1_weight_that_flips_during_a_job_is_caught_and_the_work_done_again(
    ray_cluster: Any, mortal: RewardPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1 and G2, bitwise: the output is that of an undisturbed run."""
    source = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": TEXTS}), source)
    promote, discard = OutputDirectory.promote, OutputDirectory.discard
    promoted: list[int] = []
    discarded: list[int] = []
    mortal.score_dataset(source, tmp_path / "calm", rows_per_shard=5)

    def flip_after_the_third(self: OutputDirectory, attempt: Any) -> bool:
        promoted.append(attempt.shard)
        if len(promoted) == 3:
            ray_cluster.get(mortal.actors[1].__ray_call__.remote(flip_in_body))
        return promote(self, attempt)

    def note(self: OutputDirectory, attempt: Any) -> None:
        discarded.append(attempt.shard)
        discard(self, attempt)

    monkeypatch.setattr(OutputDirectory, "promote", flip_after_the_third)
    monkeypatch.setattr(OutputDirectory, "discard", note)
    report = mortal.score_dataset(source, tmp_path / "flipped", rows_per_shard=5)
    assert mortal.verify().identical
    assert parts(tmp_path / "flipped") == parts(tmp_path / "calm")
    assert discarded
    assert sorted(promoted) == list(range(40))
    *_, reason = report.quarantined  # after those of the tests above
    assert reason.startswith("Actor 1 has changed while it worked: body")
    assert "quarantined  Actor 1 has changed" in str(report)
    manifest = json.loads((tmp_path / "flipped" / "_manifest.json").read_text())
    assert manifest["quarantined"] == list(report.quarantined)


def test_g1_without_rechecks_a_flipped_weight_goes_unseen_until_asked_for(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    """What the test above would show without what it is for."""
    with RewardPool(tiny_model, recheck_share=0, **{**TWO, "num_actors": 1}) as pool:
        before = pool.score(TEXTS)
        ray_cluster.get(pool.actors[0].__ray_call__.remote(flip_in_head))
        assert (pool.score(TEXTS) != before).any()
        with pytest.raises(DeterminismError):
            pool.verify()
        assert (pool.score(TEXTS) == before).all()
