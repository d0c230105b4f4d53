"""The job's doors, opened as a user opens them: real processes, real signals, a real Ray job."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import environment_in, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "jobs" / "score_dataset.py")
RAYREWARD = str(Path(sys.executable).with_name("rayreward"))
RAY = str(Path(sys.executable).with_name("ray"))


def flags(model: str, dataset: Path | str, output: Path) -> list[str]:
    where = ["--model", model, "--dataset", str(dataset), "--output", str(output)]
    # one thread: a second one slows a tiny model down where the cores have other work
    return [*where, "--seed", "42", "--num-actors", "1", "--num-cpus-per-actor", "1"]


def many_texts(path: Path) -> Path:
    """Enough rows that a signal comes in the middle."""
    table = pa.table({"text": [f"Answer {n} " + "is fine. " * (n % 20) for n in range(8_000)]})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("setting", "expected"), [({}, 3), ({"RAY_worker_niceness": "5"}, 8)], ids=["ours", "asked for"]
)
def test_actors_of_a_private_cluster_are_as_urgent_as_who_started_it(
    setting: dict[str, str], expected: int
) -> None:
    """By Ray's default they would be 15 less so than whatever else runs on the machine."""
    code = (
        "import os, ray\n"
        "from rayreward.fleet import RayConnection\n"
        "connection = RayConnection()\n"
        "print('niceness', ray.get(ray.remote(lambda: os.nice(0)).remote()))\n"
        "connection.close()"
    )
    around = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", *setting)}
    command = ["nice", "-n", "3", sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**around, **setting}, capture_output=True, text=True, check=False
    )
    assert f"niceness {expected}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "has_ray"),
    [([RAYREWARD, "score"], False), ([sys.executable, SCRIPT], True)],
    ids=["rayreward, which starts Ray", "script, where there is a cluster"],
)
def test_command_scores_from_any_directory(
    command: list[str],
    has_ray: bool,
    ray_cluster: Any,
    tiny_model: str,
    examples: Path,
    tmp_path: Path,
) -> None:
    dataset = examples / "formats" / "pairs_text.parquet"
    done = subprocess.run(
        [*command, *flags(tiny_model, dataset, tmp_path / "out"), "--max-failed-rows", "72"],
        cwd=tmp_path,
        env=environment_in(ray_cluster) if has_ray else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "untrained: drawn from seed 42" in done.stdout
    assert "rows/s" in done.stderr
    assert "\r" not in done.stderr
    assert pq.read_table(tmp_path / "out").num_rows == 72


@pytest.mark.parametrize(
    ("signum", "code", "has_ray"),
    [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)],
    ids=["ctrl-c, and of its Ray", "sigterm, in a cluster"],
)
def test_signal_ends_the_job_cleanly_and_the_same_command_resumes_it(
    signum: int, code: int, has_ray: bool, ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    output, cluster = tmp_path / "out", environment_in(ray_cluster)
    command = [RAYREWARD, "score", *flags(tiny_model, many_texts(tmp_path / "t.parquet"), output)]
    # weights are looked at after every shard, so that the first part comes early
    command += ["--rows-per-shard", "100", "--recheck-share", "1"]
    piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, env=cluster if has_ray else None, **piped)
    wait_for(lambda: list(output.glob("part-*.parquet")), "the first part")
    sent = time.monotonic()
    job.send_signal(signum)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert time.monotonic() - sent < 10
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert not (output / "_SUCCESS").exists()
    done = subprocess.run(command, env=cluster, timeout=240, check=True, **piped)
    assert "of them by an earlier run" in done.stdout
    result = pq.read_table(output, columns=["text", "reward_status"])
    assert result["text"].equals(pq.read_table(tmp_path / "t.parquet")["text"])
    assert set(result["reward_status"].to_pylist()) == {"ok"}


def test_fingerprint_command_prints_what_a_pool_would_hold(tiny_model: str) -> None:
    done = subprocess.run(
        [RAYREWARD, "fingerprint", "--model", tiny_model, "--seed", "42"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    held = json.loads(done.stdout)
    assert held["head_origin"] == "seeded"
    assert len(held["head"]) == 64


@contextlib.contextmanager
def ray_head() -> Iterator[tuple[str, dict[str, str]]]:
    """A local head node with job submission and token authentication, started by its command."""
    # the agent's too: another cluster on this machine may have its default port
    named = ("port", "dashboard-port", "dashboard-agent-listen-port")
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in named]
        ports = [found.getsockname()[1] for found in free]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
    }
    # a short path: it ends up in the names of sockets, which have a limit
    with tempfile.TemporaryDirectory(prefix="rr", dir="/tmp") as scratch:
        log = Path(scratch) / "head.log"
        with log.open("w") as out:
            head = subprocess.Popen(
                [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={scratch}/ray"]
                + [f"--{name}={port}" for name, port in zip(named, ports, strict=True)]
                + ["--min-worker-port=0", "--max-worker-port=0"],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(lambda: "block forever" in log.read_text(), "the head's start")
            yield f"http://127.0.0.1:{ports[1]}", environment
        finally:
            head.terminate()
            head.wait(30)


def test_ray_job_submit_scores_on_a_running_cluster(
    tiny_model: str, examples: Path, tmp_path: Path
) -> None:
    dataset = examples / "formats" / "messages.parquet"
    submit = [RAY, "job", "submit", "--working-dir", str(ROOT), "--address"]
    job = ["--", "python", "jobs/score_dataset.py", "--max-failed-rows", "144"]
    with ray_head() as (address, environment):
        settings: Any = {"env": environment, "capture_output": True, "text": True}
        run = functools.partial(subprocess.run, timeout=240, check=False, **settings)
        deadline = time.monotonic() + 120
        while True:
            done = run([*submit, address, *job, *flags(tiny_model, dataset, tmp_path / "out")])
            # a head takes jobs a while after its start
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        assert "untrained: drawn from seed 42" in done.stdout
        assert "144/144 rows (100 %)" in done.stdout
        refused = run([*submit, address, *job, *flags(tiny_model, dataset, Path("relative"))])
        assert refused.returncode == 1
        assert "is a copy that is thrown away" in refused.stdout
    assert pq.read_table(tmp_path / "out").num_rows == 144
