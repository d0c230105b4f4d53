"""A pool with a name: shared by drivers, tasks and actors of a real cluster, and updated."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from processes import wait_for
from tiny import make_checkpoint

from rayreward import (
    ConfigError,
    DataError,
    ModelConfig,
    ModelError,
    PoolBusyError,
    PoolClosedError,
    PoolError,
    PoolTimeoutError,
    RewardPool,
    Scorer,
)
from rayreward.types import Text

pytestmark = pytest.mark.ray

TEXTS = [f"Answer {n}: " + "the weather is fine. " * (n % 7) for n in range(200)]
MANY = [f"Row {n}: " + "and so on. " * 20 for n in range(4_000)]
"""Enough to keep two actors busy for seconds."""


def reference(model: str) -> list[float]:
    """The rewards of TEXTS, computed without Ray."""
    outcomes = Scorer.load(ModelConfig(model=model, seed=42)).score([Text("", t) for t in TEXTS])
    return [outcome.value for outcome in outcomes]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> list[float]:
    return reference(tiny_model)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("other") / "llama", weights_seed=2))


@pytest.fixture(scope="module")
def owner(ray_cluster: Any, tiny_model: str) -> Iterator[RewardPool]:
    settings: dict[str, Any] = {"num_actors": 2, "num_cpus_per_actor": 1}
    with RewardPool(tiny_model, seed=42, name="rm", **settings) as pool:
        yield pool


@pytest.fixture
def pool(owner: RewardPool) -> Iterator[RewardPool]:
    """As some other caller has it."""
    with RewardPool.connect("rm") as pool:
        yield pool


def test_g3_rewards_are_those_of_a_pool_of_ones_own(
    pool: RewardPool, expected: list[float]
) -> None:
    assert pool.score(TEXTS).tolist() == expected
    assert [float(pool.score([text])[0]) for text in TEXTS[:10]] == expected[:10]
    assert pool.score([]).shape == (0,)
    per_prompt = pool.score_completions(["", ""], [TEXTS[:2], TEXTS[2:5]])
    assert [list(rewards) for rewards in per_prompt] == [expected[:2], expected[2:5]]
    table = pool.score_table(pa.table({"text": [*TEXTS[:3], None]}))
    assert table["reward"].to_pylist() == [*expected[:3], None]
    assert table["reward_status"].to_pylist() == ["ok"] * 3 + ["malformed"]


def test_bad_items_are_refused_before_anything_is_sent(pool: RewardPool) -> None:
    with pytest.raises(DataError, match="type int"):
        pool.score(["a text", 3])


def test_what_each_reward_comes_from(pool: RewardPool, tiny_model: str) -> None:
    audited = pool.score_audited([TEXTS[0], ""])
    assert audited.version == pool.version
    assert audited.version.model == tiny_model
    assert audited.version.body == pool.fingerprint.body
    assert np.isnan(audited.rewards).tolist() == [False, True]
    assert audited.outcomes[1].status == "empty"  # type: ignore[union-attr]


def test_tasks_and_actors_find_the_pool_and_take_it_with_them(
    ray_cluster: Any, pool: RewardPool, expected: list[float]
) -> None:
    @ray_cluster.remote
    class Caller:
        def __init__(self, pool: RewardPool) -> None:
            self.pool = pool

        def score(self, texts: list[str]) -> list[float]:
            return [float(reward) for reward in self.pool.score(texts)]

        async def score_async(self, texts: list[str]) -> list[float]:
            return [float(reward) for reward in await self.pool.score_async(texts)]

    @ray_cluster.remote
    def score(texts: list[str]) -> list[float]:
        return [float(reward) for reward in RewardPool.connect("rm").score(texts)]

    caller = Caller.options(num_cpus=0.1).remote(pool)
    found = ray_cluster.get(
        [
            score.options(num_cpus=0.1).remote(TEXTS[:50]),
            caller.score.remote(TEXTS[50:100]),
            caller.score_async.remote(TEXTS[100:150]),
        ]
    )
    assert [reward for part in found for reward in part] == expected[:150]
    assert pickle.loads(pickle.dumps(pool)).score(TEXTS[:2]).tolist() == expected[:2]


def test_g3_many_callers_at_once_get_their_own_rewards(
    owner: RewardPool, expected: list[float]
) -> None:
    found: dict[int, float] = {}

    def ask(first: int) -> None:
        with RewardPool.connect("rm") as pool:
            for n in range(first, len(TEXTS), 20):
                found[n] = float(pool.score([TEXTS[n]])[0])

    callers = [threading.Thread(target=ask, args=(first,)) for first in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [found[n] for n in range(len(TEXTS))] == expected


def test_an_answer_that_takes_too_long_is_not_waited_for(pool: RewardPool) -> None:
    with pytest.raises(PoolTimeoutError, match=r"did not answer within 0\.05 s"):
        pool.score(MANY, timeout_s=0.05)
    wait_for(lambda: pool.status.requests == 0, "the request being dropped", 5)
    assert pool.status.rows_waiting == 0


def test_what_is_cancelled_is_dropped(pool: RewardPool) -> None:
    async def begin_and_cancel() -> None:
        asking = asyncio.create_task(pool.score_async(MANY))
        while not pool.status.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(begin_and_cancel())
    wait_for(lambda: pool.status.requests == 0, "the request being dropped", 5)
    assert pool.status.rows_waiting == 0


def test_a_caller_that_dies_takes_its_work_with_it(ray_cluster: Any, pool: RewardPool) -> None:
    @ray_cluster.remote
    class Caller:
        def score(self, texts: list[str]) -> int:
            return len(RewardPool.connect("rm").score(texts))

    caller = Caller.options(num_cpus=0.1).remote()
    scored = pool.status.rows_scored
    caller.score.remote(MANY * 20)
    wait_for(lambda: pool.status.requests, "the request")
    ray_cluster.kill(caller)
    wait_for(lambda: pool.status.requests == 0, "the request being dropped", 30)
    assert pool.status.rows_scored - scored < len(MANY) * 20


def test_an_actor_that_dies_loses_no_request(
    ray_cluster: Any, owner: RewardPool, pool: RewardPool, expected: list[float]
) -> None:
    found: list[list[float]] = []

    def ask() -> None:
        found.append(RewardPool.connect("rm").score(TEXTS * 5).tolist())

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    wait_for(lambda: pool.status.requests, "the request")
    ray_cluster.kill(pool.actors[0])
    for caller in callers:
        caller.join()
    assert found == [expected * 5] * 4
    wait_for(lambda: pool.status.actors == 2, "the replacement")
    assert pool.verify().identical


def test_update_exchanges_the_weights_at_once(
    ray_cluster: Any,
    owner: RewardPool,
    pool: RewardPool,
    tiny_model: str,
    other_model: str,
    expected: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Callers that ask all the while get the old rewards or the new ones, and never a mix."""
    monkeypatch.chdir(Path(other_model).parents[1])  # where the keeper is not
    old, new = pool.version.number, pool.version.number + 1
    by_version = {old: expected, new: reference(other_model)}
    seen: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        with RewardPool.connect("rm") as other:
            while not ended.is_set():
                audited = other.score_audited(TEXTS)
                assert audited.rewards.tolist() == by_version[audited.version.number]
                seen.append(audited.version.number)

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    wait_for(lambda: len(seen) > 3, "the fourth answer")
    with pytest.raises(ModelError, match="does not exist"):
        pool.update(tiny_model + "-that-is-nowhere")
    assert pool.version.number == old
    version = pool.update(os.path.relpath(other_model))
    assert (version.number, version.model) == (new, other_model)
    wait_for(lambda: seen[-6:] == [new] * 6, "the change")
    ended.set()
    for caller in callers:
        caller.join()
    assert seen == sorted(seen)
    ray_cluster.kill(pool.actors[0])
    assert pool.score(TEXTS).tolist() == by_version[new]
    wait_for(lambda: pool.status.actors == 2, "the replacement")
    assert pool.verify().identical
    assert pool.score(TEXTS).tolist() == by_version[new]
    assert owner.update(tiny_model).number == new + 1  # as the other tests expect it
    assert pool.score(TEXTS).tolist() == expected


def test_update_of_a_pool_without_a_name(
    mortal: RewardPool, tiny_model: str, other_model: str, expected: list[float]
) -> None:
    before = mortal.version.number
    assert mortal.update(other_model).number == before + 1
    assert mortal.score(TEXTS).tolist() == reference(other_model)
    assert mortal.update(tiny_model).number == before + 2
    assert mortal.score(TEXTS).tolist() == expected
    with pytest.raises(PoolError, match="Open it with RewardPool"):
        pickle.dumps(mortal)
    with pytest.raises(PoolTimeoutError):
        mortal.score(MANY, timeout_s=0.05)
    assert mortal.score(TEXTS).tolist() == expected


def test_a_full_pool_refuses_or_is_waited_for(
    ray_cluster: Any, tiny_model: str, expected: list[float]
) -> None:
    settings: dict[str, Any] = {"num_actors": 1, "num_cpus_per_actor": 1, "max_queued_rows": 64}
    with RewardPool(tiny_model, seed=42, name="small", **settings) as pool:

        async def hurry() -> list[Any]:
            asked = [pool.score_audited_async(TEXTS[:60], patient=False) for _ in range(12)]
            return await asyncio.gather(*asked, return_exceptions=True)

        found = asyncio.run(hurry())
        refused = [error for error in found if isinstance(error, PoolBusyError)]
        answered = [audited for audited in found if not isinstance(audited, BaseException)]
        assert refused
        assert answered
        assert len(refused) + len(answered) == 12
        for audited in answered:
            assert audited.rewards.tolist() == expected[:60]
        assert pool.score(TEXTS).tolist() == expected  # patient


def test_names_are_found_once_and_only_while_the_pool_lives(
    ray_cluster: Any, owner: RewardPool, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny_model).parents[1])  # where the keeper is not
    with pytest.raises(PoolError, match="a pool named 'rm' in this cluster already"):
        RewardPool(tiny_model, seed=42, name="rm", num_cpus_per_actor=1)
    with pytest.raises(PoolError, match="no pool named 'nobody' .* there are: .*rm"):
        RewardPool.connect("nobody")
    with pytest.raises(ConfigError, match="needs a name"):
        RewardPool(tiny_model, seed=42, lifetime="detached")
    with RewardPool(tiny_model, seed=42, name="brief", num_actors=1, num_cpus_per_actor=1) as pool:
        other = RewardPool.connect("brief")
        with pytest.raises(PoolError, match="a job needs actors of its own"):
            pool.score_dataset("rows.parquet", "out")
    with pytest.raises(PoolClosedError, match="The pool 'brief' is gone"):
        other.score(["a"])
    with pytest.raises(PoolClosedError, match="This object is closed"):
        pool.score(["a"])
    with pytest.raises(ModelError):
        RewardPool(tiny_model + "-that-is-nowhere", name="brief", num_actors=1)
    model = os.path.relpath(tiny_model)
    with RewardPool(model, seed=42, name="brief", num_actors=1, num_cpus_per_actor=1) as pool:
        assert len(pool.score(["a"])) == 1


def test_a_detached_pool_outlives_who_opened_it(
    ray_cluster: Any, tiny_model: str, expected: list[float]
) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    code = (
        "import sys; from rayreward import RewardPool\n"
        f"RewardPool({tiny_model!r}, seed=42, num_actors=1, num_cpus_per_actor=1, name='stays',"
        f" lifetime='detached', ray_address={address!r})\n"
        "print('up', flush=True); sys.stdin.read()"
    )
    opener = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert opener.stdout is not None
    assert opener.stdout.readline().strip() == b"up"
    os.kill(opener.pid, signal.SIGKILL)
    opener.communicate()
    with RewardPool.connect("stays") as pool:
        assert pool.score(TEXTS).tolist() == expected
    with RewardPool.connect("stays") as pool:
        ray_cluster.kill(pool.actors[0])
        assert pool.score(TEXTS).tolist() == expected
        pool.shut_down()
    with pytest.raises(PoolError, match="no pool named 'stays'"):
        RewardPool.connect("stays")


def test_actors_live_where_the_caller_has_reserved_room(ray_cluster: Any, tiny_model: str) -> None:
    group = ray_cluster.util.placement_group([{"CPU": 1}] * 2)
    ray_cluster.get(group.ready())
    try:
        with RewardPool(tiny_model, seed=42, placement_group=group, name="placed") as pool:
            assert pool.status.actors == 2

            def group_of(_: Any) -> str:
                import ray

                return str(ray.get_runtime_context().get_placement_group_id())

            calls = [actor.__ray_call__.remote(group_of) for actor in pool.actors]
            assert set(ray_cluster.get(calls)) == {group.id.hex()}
    finally:
        ray_cluster.util.remove_placement_group(group)
