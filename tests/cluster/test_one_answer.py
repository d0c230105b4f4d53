"""G2, one answer: the same bytes, whatever the actors, their deaths and their order."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from files import pairs, parts
from processes import environment_in, wait_for

from rayreward import RewardPool
from rayreward.dispatch import Dispatcher, Result
from rayreward.events import Task

pytestmark = pytest.mark.ray

RAYREWARD = str(Path(sys.executable).with_name("rayreward"))


def test_g2_same_bytes_for_any_number_of_actors_and_shards_in_flight(
    pool: RewardPool, tiny_model: str, tmp_path: Path
) -> None:
    """G2, bitwise: the whole of every part. The pool has two actors, and two shards each."""
    source = pairs(tmp_path / "pairs.parquet")
    pool.score_dataset(source, tmp_path / "out-2", rows_per_shard=20)
    found = [parts(tmp_path / "out-2")]
    for actors, tasks in ((1, 1), (3, 4)):
        output = tmp_path / f"out-{actors}"
        with RewardPool(
            tiny_model, seed=42, num_actors=actors, num_cpus_per_actor=1, tasks_per_actor=tasks
        ) as other:
            other.score_dataset(source, output, rows_per_shard=20)
        found.append(parts(output))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 10


def test_g2_same_bytes_when_an_actor_is_killed(mortal: RewardPool, tmp_path: Path) -> None:
    source = pairs(tmp_path / "pairs.parquet")
    mortal.score_dataset(source, tmp_path / "calm", rows_per_shard=10)
    os.kill(mortal._engine.dispatcher.births[0].pid, signal.SIGKILL)
    mortal.score_dataset(source, tmp_path / "killed", rows_per_shard=10)
    assert parts(tmp_path / "killed") == parts(tmp_path / "calm")


def test_g2_same_bytes_when_shards_finish_in_any_order(
    pool: RewardPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pairs(tmp_path / "pairs.parquet")
    pool.score_dataset(source, tmp_path / "in order", rows_per_shard=10)
    run, done = Dispatcher.run, []

    def shuffled(self: Dispatcher, tasks: Iterable[Task], **settings: Any) -> Iterator[Result]:
        mixed = list(tasks)
        random.Random(0).shuffle(mixed)
        for result in run(self, mixed, **settings):
            done.append(result.task.key)
            yield result

    monkeypatch.setattr(Dispatcher, "run", shuffled)
    pool.score_dataset(source, tmp_path / "shuffled", rows_per_shard=10)
    assert done != sorted(done)
    assert parts(tmp_path / "shuffled") == parts(tmp_path / "in order")


def test_g2_same_bytes_when_the_driver_is_killed_and_the_job_resumed(
    ray_cluster: Any, pool: RewardPool, tiny_model: str, tmp_path: Path
) -> None:
    source, output = pairs(tmp_path / "pairs.parquet", rows=6_000), tmp_path / "killed"
    pool.score_dataset(source, tmp_path / "calm")
    command = [RAYREWARD, "score", "--model", tiny_model, "--seed", "42", "--num-actors", "1"]
    command += ["--num-cpus-per-actor", "1", "--dataset", str(source), "--output", str(output)]
    # looks at the weights after every shard, so that parts are there early on
    command += ["--recheck-share", "1"]
    cluster = environment_in(ray_cluster)
    job = subprocess.Popen(command, env=cluster, stderr=subprocess.DEVNULL)
    wait_for(lambda: parts(output) or job.poll() is not None, "the first part")
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert 0 < len(parts(output)) < len(parts(tmp_path / "calm"))
    assert not (output / "_SUCCESS").exists()
    report = pool.score_dataset(source, output)
    assert report.rows_before > 0
    assert parts(output) == parts(tmp_path / "calm")


def test_g2_the_same_rows_in_any_row_groups_give_the_same_bytes(
    pool: RewardPool, tmp_path: Path
) -> None:
    """Shards are cut by count alone, through row groups."""
    found = []
    for size in (7, 33, 200):
        source = pairs(tmp_path / f"{size}.parquet", row_group_size=size)
        pool.score_dataset(source, tmp_path / str(size), rows_per_shard=20)
        found.append(parts(tmp_path / str(size)))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 10
