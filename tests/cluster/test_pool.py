"""The pool with real actors in a real Ray cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from rayreward import (
    DataError,
    ModelConfig,
    ModelError,
    PlacementError,
    PoolClosedError,
    PoolConfig,
    RewardPool,
    Scorer,
    SharingConfig,
    local,
)
from rayreward.types import Reward, Text

pytestmark = pytest.mark.ray

TEXTS = [f"Answer {n}: " + "the weather is fine. " * (n % 7) for n in range(200)]


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> list[float]:
    """The rewards of TEXTS, computed without Ray."""
    outcomes = Scorer.load(ModelConfig(model=tiny_model, seed=42)).score(
        [Text("", text) for text in TEXTS]
    )
    return [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]


def kill(pool: RewardPool, actor: int) -> None:
    os.kill(pool._engine.dispatcher.births[actor].pid, signal.SIGKILL)


def test_score_returns_float32_in_the_batchs_order(pool: RewardPool, expected: list[float]) -> None:
    rewards = pool.score(TEXTS)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_score_takes_texts_records_and_conversations_mixed(pool: RewardPool) -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rewards = pool.score(
        [
            "a b",
            {"prompt": "a ", "completion": "b"},
            conversation,
            {"prompt": conversation[:1], "completion": conversation[1:]},
            {"messages": conversation},
        ]
    )
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    assert rewards[2] == pytest.approx(rewards[3], abs=1e-6)
    assert rewards[2] == pytest.approx(rewards[4], abs=1e-6)
    assert abs(rewards[0] - rewards[2]) > 1e-4


def test_score_of_nothing_is_empty(pool: RewardPool) -> None:
    assert pool.score([]).shape == (0,)


def test_score_has_nan_and_never_zero_where_a_row_has_no_reward(pool: RewardPool) -> None:
    rewards = pool.score(["fine", "", "x" * 5000])
    assert np.isnan(rewards).tolist() == [False, True, True]


def test_score_refuses_what_it_does_not_know(pool: RewardPool) -> None:
    with pytest.raises(DataError, match="Can't score a value of type int"):
        pool.score(["fine", 7])


def test_one_text_is_not_scored_letter_by_letter(pool: RewardPool, ray_cluster: Any) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: pool.score("fine"),
        lambda: asyncio.run(pool.score_async("fine")),
        lambda: pool.score({"prompt": "fine ", "completion": "weather"}),
        lambda: pool.score_completions(["fine "], ["weather"]),
        lambda: pool.score_completions("f", [["weather"]]),
        lambda: ray_cluster.get(pool.actors[0].score_batch.remote("fine")),
    ]
    for way in ways:
        with pytest.raises(DataError, match="Put it into a list"):
            way()


def test_score_async_lets_others_run(pool: RewardPool, expected: list[float]) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(pool.score_async(TEXTS[:100]), pool.score_async(TEXTS[100:]))

    rewards = np.concatenate(asyncio.run(both()))
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_score_completions_gives_an_array_for_each_prompt(pool: RewardPool) -> None:
    prompts = ["one ", "two ", "three "]
    completions = [["a", "b", "c"], [], ["d"]]
    rewards = pool.score_completions(prompts, completions)
    flat = pool.score(["one a", "one b", "one c", "three d"])
    assert [len(group) for group in rewards] == [3, 0, 1]
    assert np.concatenate(rewards).tolist() == pytest.approx(flat.tolist(), abs=1e-6)


def test_score_completions_refuses_lists_that_do_not_pair_up(pool: RewardPool) -> None:
    with pytest.raises(DataError, match="2 prompts but 1 lists"):
        pool.score_completions(["a", "b"], [["c"]])


def test_score_table_keeps_the_columns_and_adds_its_own(pool: RewardPool) -> None:
    table = pa.table({"id": range(150), "chosen": TEXTS[:150], "rejected": TEXTS[50:]})
    scored = pool.score_table(table)
    assert scored.select(table.column_names).equals(table)
    chosen, rejected = scored["reward_chosen"].to_pylist(), scored["reward_rejected"].to_pylist()
    assert chosen[50:] == pytest.approx(rejected[:100], abs=1e-6)
    assert set(scored["reward_status"].to_pylist()) == {"ok"}


def test_score_table_takes_views_of_text(pool: RewardPool) -> None:
    text = pa.array(TEXTS[:100]).cast(pa.string_view())
    scored = pool.score_table(pa.table({"text": text}))
    assert scored["text"].type == pa.string_view()
    assert scored["reward"].to_pylist() == pytest.approx(pool.score(TEXTS[:100]).tolist(), abs=1e-6)


def test_score_table_takes_data_frames(pool: RewardPool) -> None:
    scored = pool.score_table(pd.DataFrame({"text": TEXTS[:10]}, index=range(5, 15)))
    assert scored.to_pandas().index.tolist() == list(range(5, 15))
    assert scored["reward"].to_pylist() == pytest.approx(pool.score(TEXTS[:10]).tolist(), abs=1e-6)


def test_actors_score_batches_of_every_kind(pool: RewardPool, ray_cluster: Any) -> None:
    actor = pool.actors[0]
    table = pa.table({"prompt": ["a ", "c "], "response": ["b", "d"]})
    batches: list[Any] = [
        ["a b", "c d"],
        [{"prompt": "a ", "response": "b"}, {"text": "c d"}],
        table,
        table.to_batches()[0],
    ]
    results = ray_cluster.get([actor.score_batch.remote(batch) for batch in batches])
    for rewards in results:
        assert rewards.dtype == np.float32
        assert rewards.tolist() == pytest.approx(results[0].tolist(), abs=1e-6)


def test_actors_refuse_rows_with_two_rewards(pool: RewardPool, ray_cluster: Any) -> None:
    pairs = pa.table({"chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(DataError, match="more than one reward"):
        ray_cluster.get(pool.actors[0].score_batch.remote(pairs))


def test_actors_without_a_gpu_can_touch_none(pool: RewardPool, ray_cluster: Any) -> None:
    def look(_actor: Any) -> tuple[str | None, int]:
        import torch

        return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()

    seen = ray_cluster.get([actor.__ray_call__.remote(look) for actor in pool.actors])
    assert seen == [("", 1), ("", 1)]


def test_an_actors_model_runs_on_one_thread_and_its_process_has_one_arena(
    ray_cluster: Any, tiny_model: str
) -> None:
    """From whichever threads it is called, and after an update, too."""

    def watch(actor: Any) -> str | None:
        actor.computed_on = getattr(actor, "computed_on", set())
        rewards = actor._scorer._rewards

        def watched(batch: Any) -> Any:
            actor.computed_on.add(threading.get_ident())
            return rewards(batch)

        actor._scorer._rewards = watched
        return os.environ.get("MALLOC_ARENA_MAX")

    with RewardPool(tiny_model, seed=42, num_actors=1, num_cpus_per_actor=0.5) as pool:
        for _ in range(2):
            assert ray_cluster.get(pool.actors[0].__ray_call__.remote(watch)) == "1"
            actor = pool.actors[0]
            ray_cluster.get([actor.score_batch.remote([text]) for text in TEXTS[:20]])
            pool.verify()
            pool.update(tiny_model)
        computed_on = pool.actors[0].__ray_call__.remote(lambda actor: len(actor.computed_on))
        assert ray_cluster.get(computed_on) == 1


def test_dead_actor_is_replaced_and_its_work_done_again(
    mortal: RewardPool, expected: list[float]
) -> None:
    pids = {birth.pid for birth in mortal._engine.dispatcher.births.values()}
    kill(mortal, 0)
    assert mortal.score(TEXTS).tolist() == pytest.approx(expected, abs=1e-6)
    assert sorted(mortal.verify().fingerprints) == [0, 1]  # waits for the replacement
    assert len(pids & {birth.pid for birth in mortal._engine.dispatcher.births.values()}) == 1


def test_no_room_is_an_error_that_says_what_was_asked_and_what_there_is(
    ray_cluster: Any, tiny_model: str
) -> None:
    with pytest.raises(PlacementError, match=r"1000 CPU each.*of 12 CPU free"):
        RewardPool(
            tiny_model, seed=42, num_actors=1, num_cpus_per_actor=1000, placement_timeout_s=1
        )


def test_gpu_that_is_not_there_is_an_error(ray_cluster: Any, tiny_model: str) -> None:
    with pytest.raises(PlacementError, match=r"1 CPU and 1 GPU each.*0 of 0 GPU free"):
        RewardPool(tiny_model, seed=42, num_actors=1, num_gpus_per_actor=1, placement_timeout_s=1)


def test_model_errors_come_through_as_they_are(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    """What only the built model tells comes from an actor."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match="has no head. Pass seed") as caught:
        RewardPool(str(model), num_actors=1, num_cpus_per_actor=1)
    assert type(caught.value) is ModelError


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (None, {}, "has no head. Pass seed"),
        (None, {"seed": 1, "head": "trained"}, "no trained head"),
        ("/nowhere/at/all", {"seed": 1}, "does not exist"),
    ],
)
def test_what_the_files_tell_is_told_before_anything_starts(
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    model: str | None,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(local, "RayConnection", lambda address: pytest.fail("Ray is asked for"))
    with pytest.raises(ModelError, match=message):
        RewardPool(model or tiny_model, **settings)


def test_closed_pool_says_so(ray_cluster: Any, tiny_model: str) -> None:
    pool = RewardPool(tiny_model, seed=42, num_actors=1, num_cpus_per_actor=1)
    pool.close()
    pool.close()
    for use in (lambda: pool.score(["a"]), pool.verify, lambda: pool.actors):
        with pytest.raises(PoolClosedError):
            use()
    assert ray_cluster.is_initialized()  # Ray was there before the pool


def test_constructor_has_the_configs_fields_and_defaults() -> None:
    parameters = inspect.signature(RewardPool.__init__).parameters
    configs = (ModelConfig, PoolConfig, SharingConfig)
    fields = [field for config in configs for field in dataclasses.fields(config)]
    expected = {field.name: field.default for field in fields if field.name != "model"}
    expected["placement_group"] = None
    found = {name: p.default for name, p in parameters.items() if name not in ("self", "model")}
    assert found == expected
