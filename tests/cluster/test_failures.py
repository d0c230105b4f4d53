"""Bad things, one at a time: rows that kill, actors that hang, machines that go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import wait_for

from rayreward import PoolError, RewardPool, fleet
from rayreward.actor import RewardActor

pytestmark = pytest.mark.ray

RAYREWARD = Path(sys.executable).with_name("rayreward")
CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def faulty_actor(once: Path) -> type[RewardActor]:
    """An actor that does what its rows say: dies over KILL, and hangs over HANG, that once.

    Defined in a function, so that it travels to the workers by value.
    """

    class FaultyActor(RewardActor):
        def load(self, head: Any = None) -> Any:
            birth = super().load(head)
            score_table = self._scorer.score_table

            def score(table: Any, *arguments: Any, **settings: Any) -> Any:
                given_up = arguments[2] if len(arguments) > 2 else {}
                for number, text in enumerate(table["prompt"].to_pylist()):
                    if "KILL" in text and number not in given_up:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if "HANG" in text and not once.exists():
                        once.touch()
                        threading.Event().wait()
                return score_table(table, *arguments, **settings)

            self._scorer.score_table = score
            return birth

    return FaultyActor


def write_rows(path: Path, rows: int, bad: dict[int, str] | None = None) -> str:
    prompts = [f"{(bad or {}).get(n, 'row')} {n} and " for n in range(rows)]
    columns = {"id": list(range(rows)), "prompt": prompts}
    columns |= {side: [f"the {side} {n}" for n in range(rows)] for side in ("chosen", "rejected")}
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output).sort_by("id").to_pylist()


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fleet, "RewardActor", faulty_actor(tmp_path / "once"))
    return tmp_path / "once"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "faulty")
def test_rows_that_kill_get_no_reward_and_all_others_get_theirs(
    tiny_model: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.parquet", 24, {5: "KILL"})
    calm = write_rows(tmp_path / "calm.parquet", 24)
    settings: dict[str, Any] = {"num_actors": 1, "num_cpus_per_actor": 1, "max_attempts": 2}
    with RewardPool(tiny_model, seed=42, **settings) as pool:
        report = pool.score_dataset(source, tmp_path / "out", rows_per_shard=2, max_failed_rows=1)
        pool.score_dataset(calm, tmp_path / "calm", rows_per_shard=2)
    assert report.tally.failed == {"poison": 1}
    found, expected = rows_of(tmp_path / "out"), rows_of(tmp_path / "calm")
    assert found[5]["reward_status"] == "poison"
    assert found[5]["reward_chosen"] is found[5]["reward_rejected"] is None
    assert "died over this row" in found[5]["reward_detail"]
    assert "KILL" in found[5]["prompt"]
    assert found[:5] + found[6:] == expected[:5] + expected[6:]


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_hangs_is_replaced(tiny_model: str, tmp_path: Path, faulty: Path) -> None:
    source = write_rows(tmp_path / "rows.parquet", 24, {9: "HANG"})
    with RewardPool(
        tiny_model, seed=42, num_actors=1, num_cpus_per_actor=1, silent_after_s=20.0
    ) as pool:
        first = pool._engine.dispatcher.births[0].pid
        report = pool.score_dataset(source, tmp_path / "out", rows_per_shard=4)
        assert pool._engine.dispatcher.births[0].pid != first
    assert faulty.exists()
    assert (report.tally.rows, report.tally.failed) == (24, {})


def test_an_actor_that_never_loads_its_model_is_replaced(
    ray_cluster: Any, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = tmp_path / "once"

    def stuck() -> type[RewardActor]:
        class StuckActor(RewardActor):
            def load(self, head: Any = None) -> Any:
                if not once.exists():
                    once.touch()
                    threading.Event().wait()
                return super().load(head)

        return StuckActor

    monkeypatch.setattr(fleet, "RewardActor", stuck())
    settings: dict[str, Any] = {"num_actors": 1, "num_cpus_per_actor": 1, "silent_after_s": 20.0}
    with RewardPool(tiny_model, seed=42, **settings) as pool:
        assert len(pool.score(["a text"])) == 1
    assert once.exists()


def test_a_job_whose_rows_get_no_reward_stops_early(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    """Every row is too long: after the first thousand it is clear that something else is wrong."""
    source = write_rows(tmp_path / "rows.parquet", 6_000)
    with RewardPool(tiny_model, seed=42, num_actors=1, num_cpus_per_actor=1, max_length=2) as pool:
        with pytest.raises(PoolError, match=r"of the first \d+ rows have no reward .* too_long"):
            pool.score_dataset(source, tmp_path / "out", rows_per_shard=100)
        done = len(list((tmp_path / "out").glob("part-*")))
        assert 10 <= done < 60
        report = pool.score_dataset(
            source, tmp_path / "out", rows_per_shard=100, max_failed_share=1.0
        )
    assert report.rows_before == done * 100
    assert report.tally.failed == {"too_long": 6_000}


def test_a_clock_that_jumps_changes_nothing(
    pool: RewardPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's time of day runs backwards by an hour a look; input is from the future."""
    source = write_rows(tmp_path / "rows.parquet", 40)
    pool.score_dataset(source, tmp_path / "calm", rows_per_shard=10)
    now = iter(range(2**31, 0, -3_600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    os.utime(source, (2**32, 2**32))
    report = pool.score_dataset(source, tmp_path / "jumpy", rows_per_shard=10)
    monkeypatch.undo()
    assert report.elapsed_s > 0
    assert report.tally.rows == 40
    for part in (tmp_path / "calm").glob("part-*"):
        assert (tmp_path / "jumpy" / part.name).read_bytes() == part.read_bytes()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of a head that has no room for actors; machines are added by the test."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    soon = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def work_on(machine: Any) -> bool:
    """Whether an actor is scoring on a machine of the test's own cluster."""
    [raylet] = machine.all_processes["raylet"]
    try:
        children = psutil.Process(raylet.process.pid).children()
        return ["ray::RewardActor.work"] in [child.cmdline()[:1] for child in children]
    except psutil.NoSuchProcess:  # one of them has ended meanwhile
        return False


@pytest.mark.slow
def test_actors_join_and_leave_with_their_machines(
    pool: RewardPool, machines: Any, tiny_model: str, tmp_path: Path
) -> None:
    """Work begins with one of two actors, the other joins, and its machine goes: no fault of it."""
    source, output = write_rows(tmp_path / "rows.parquet", 12_000), tmp_path / "out"

    def parts() -> int:
        return len(list(output.glob("part-*")))

    machines.add_node(num_cpus=1, wait=False)
    command = [RAYREWARD, "score", "--model", tiny_model, "--seed", "42", "--dataset", source]
    command += ["--output", str(output), "--rows-per-shard", "20", "--num-actors", "2"]
    command += ["--num-cpus-per-actor", "1", "--ray-address", machines.address]
    # a death that counted would be one too many
    command += ["--max-attempts", "1", "--recheck-share", "1", "--placement-timeout-s", "120"]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: parts() > 3, "the fourth part")
        late = machines.add_node(num_cpus=1, wait=False)
        wait_for(lambda: work_on(late), "work on the late machine")
        assert driver.poll() is None
        machines.remove_node(late, allow_graceful=False)
        _, said = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    # whichever of the two Ray had placed there
    assert re.search(r"actor [01] died and is replaced", said)
    pool.score_dataset(source, tmp_path / "calm", rows_per_shard=20)
    expected = sorted((tmp_path / "calm").glob("part-*"))
    assert len(expected) == parts() == 600
    for part in expected:
        assert (output / part.name).read_bytes() == part.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chaos_loses_nothing_repeats_nothing_and_changes_no_byte(tmp_path: Path) -> None:
    """The short form of the benchmark: mostly actors, a machine and the driver's disk."""
    command = [sys.executable, str(CHAOS), "--kills", "4", "--rows", "400", "--seed", "3"]
    done = subprocess.run(
        [*command, "--result", str(tmp_path / "chaos.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
