"""Jobs from and to object stores: the bytes of a local run, whatever dies or fails on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from files import pairs, parts
from processes import wait_for
from remote import KEY, S3, SECRET, Request, web

import rayreward
from rayreward import DataError, JobConfig, ModelConfig, OutputError, RewardPool, cli
from rayreward.job import prepare_job
from rayreward.writing import OutputDirectory

pytestmark = pytest.mark.ray

COMMAND = [sys.executable, "-c", "import sys; from rayreward import cli; sys.exit(cli.main())"]
MODEL = ModelConfig(model="m", seed=42)


@pytest.fixture
def prefix() -> str:
    """A prefix of the bucket that no other test uses."""
    return uuid.uuid4().hex


def _secrets_shown(s3: S3, prefix: str) -> list[str]:
    """Objects in which a key or its secret stands."""
    contents = {key: s3.get(f"{prefix}/{key}") for key in s3.keys(prefix)}
    return [k for k, v in contents.items() if KEY.encode() in v or SECRET.encode() in v]


def _is(method: str, part: str) -> Any:
    return lambda request: request.method == method and part in request.path


def test_g2_job_from_s3_to_s3_gives_the_bytes_of_a_local_one(
    pool: RewardPool, s3: S3, prefix: str, tmp_path: Path
) -> None:
    """G2, bitwise. The actors know keys and endpoint from the URLs alone."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        content = pairs(tmp_path / "in" / f"{name}.parquet").read_bytes()
        s3.put(f"{prefix}/in/{name}.parquet", content)
    pool.score_dataset(tmp_path / "in", tmp_path / "out", rows_per_shard=25)
    s3.server.fail("slow_down", _is("GET", "in/a.parquet"), times=2)
    s3.server.fail("cut", _is("GET", "in/b.parquet"))
    s3.server.fail("slow_down", _is("PUT", "attempts"))
    s3.server.fail("drop", _is("PUT", "ledger"))
    source, output = s3.url(f"{prefix}/in/*.parquet"), s3.url(f"{prefix}/out")
    report = pool.score_dataset(source, output, rows_per_shard=25)
    assert s3.server.faults == []
    assert report.tally.rows == 400
    assert report.output == s3.name(f"{prefix}/out")
    assert len(s3.parts(f"{prefix}/out")) == 16
    assert s3.parts(f"{prefix}/out") == parts(tmp_path / "out")
    manifest = OutputDirectory(output).read_manifest()
    assert {p["name"]: p["sha256"] for p in manifest["parts"]} == parts(tmp_path / "out")
    attempts = f"{prefix}/out/_rayreward/attempts"  # of a shard that two were at, one may yet come
    wait_for(lambda: not s3.keys(attempts), "the end of all attempts")
    assert _secrets_shown(s3, f"{prefix}/out") == []
    assert {request.user_key for request in s3.server.requests} == {KEY}
    again = pool.score_dataset(source, output, rows_per_shard=25)
    assert again.rows_before == 400


def test_http_file_is_scored(pool: RewardPool, tmp_path: Path) -> None:
    content = pairs(tmp_path / "pairs.parquet").read_bytes()
    pool.score_dataset(tmp_path / "pairs.parquet", tmp_path / "local")
    with web({"/pairs.parquet": content}) as server:
        url = f"http://{server.address}/pairs.parquet?signature=SECRET"
        pool.score_dataset(url, tmp_path / "out")
    assert parts(tmp_path / "out") == parts(tmp_path / "local")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in written if b"SECRET" in path.read_bytes()]


@pytest.fixture
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a process that finds keys and endpoint there; also of this one."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    root = str(Path(rayreward.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "RAYREWARD_TEST": "1"}


@pytest.mark.slow
def test_g2_job_that_is_killed_between_part_and_ledger_is_resumed(
    pool: RewardPool,
    s3: S3,
    environment: dict[str, str],
    prefix: str,
    tiny_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = pairs(tmp_path / "pairs.parquet")
    s3.put(f"{prefix}/pairs.parquet", source.read_bytes())
    pool.score_dataset(source, tmp_path / "calm", rows_per_shard=20)
    wanted = parts(tmp_path / "calm")

    command = [*COMMAND, "score", "--model", tiny_model, "--seed", "42", "--rows-per-shard", "20"]
    command += ["--num-actors", "1", "--num-cpus-per-actor", "1", "--recheck-share", "1"]
    command += ["--dataset", s3.name(f"{prefix}/pairs.parquet")]
    command += ["--output", s3.name(f"{prefix}/out")]
    seen: list[Request] = []

    def fourth_entry(request: Request) -> bool:
        if _is("PUT", "/_rayreward/ledger/")(request):
            seen.append(request)
        return len(seen) == 4

    s3.server.fail("hold", fourth_entry)
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert s3.server.held.wait(120)
    finally:
        job.kill()
        s3.server.released.set()
        job.communicate()
    assert job.returncode == -signal.SIGKILL
    left = s3.keys(f"{prefix}/out")
    assert len([key for key in left if "ledger" in key]) == 3
    assert len(s3.parts(f"{prefix}/out")) == 4
    assert "_SUCCESS" not in left
    with pytest.raises(OutputError, match="is no finished output"):
        OutputDirectory(s3.name(f"{prefix}/out")).read_manifest()

    s3.server.requests.clear()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert s3.parts(f"{prefix}/out") == wanted
    copied = [request.path for request in s3.server.requests if _is("PUT", "/part-")(request)]
    assert len([path for path in copied if "ledger" not in path]) == len(wanted) - 3
    assert _secrets_shown(s3, f"{prefix}/out") == []
    assert SECRET not in done.stdout + done.stderr

    assert cli.main(["verify", s3.name(f"{prefix}/out")]) == 0
    assert "parts are what their checksums say" in capsys.readouterr().out
    s3.put(f"{prefix}/out/part-000002.parquet", s3.get(f"{prefix}/out/part-000001.parquet"))
    assert cli.main(["verify", s3.name(f"{prefix}/out")]) == 1
    assert "part-000002.parquet is not what its checksum says" in capsys.readouterr().out
    s3.files.delete_file(f"data/{prefix}/out/part-000002.parquet")
    assert cli.main(["verify", s3.name(f"{prefix}/out")]) == 1
    assert "part-000002.parquet is missing" in capsys.readouterr().out


def test_store_that_goes_on_failing_ends_the_job_and_it_can_be_resumed(
    pool: RewardPool, s3: S3, prefix: str, tmp_path: Path
) -> None:
    """An actor that can't read is no reason for rows without rewards."""
    source = pairs(tmp_path / "pairs.parquet")
    s3.put(f"{prefix}/pairs.parquet", source.read_bytes())
    pool.score_dataset(source, tmp_path / "out", rows_per_shard=50)
    arguments = (s3.url(f"{prefix}/pairs.parquet"), s3.url(f"{prefix}/out"))
    job = prepare_job(
        JobConfig(dataset=arguments[0], output=arguments[1], rows_per_shard=50), pool.model_config
    )
    s3.server.fail("denied", _is("GET", "pairs.parquet"), times=20)
    with pytest.raises(DataError, match=r"pairs\.parquet can't be read: access is denied"):
        pool.run_job(job)
    s3.server.faults.clear()
    pool.score_dataset(*arguments, rows_per_shard=50)
    assert s3.parts(f"{prefix}/out") == parts(tmp_path / "out")


# What is found before anything starts


def _prepare(dataset: str, output: str) -> Any:
    return prepare_job(JobConfig(dataset=dataset, output=output), MODEL)


def test_prepare_job_keeps_inputs_and_outputs_in_a_store_apart(
    s3: S3, prefix: str, tmp_path: Path
) -> None:
    content = pairs(tmp_path / "a.parquet").read_bytes()
    s3.put(f"{prefix}/in/a.parquet", content)
    one, whole = s3.url(f"{prefix}/in/a.parquet"), s3.url(f"{prefix}/in")
    for output in (f"{prefix}/in", prefix):
        for dataset in (one, whole, s3.url(f"{prefix}/in/*.parquet")):
            with pytest.raises(OutputError, match="lies inside the (output|input) directory"):
                _prepare(dataset, s3.url(output))
    for dataset in (whole, s3.url(f"{prefix}/in/**/*.parquet")):
        with pytest.raises(OutputError, match="lies inside the input directory s3://"):
            _prepare(dataset, s3.url(f"{prefix}/in/out"))
    for output in (f"{prefix}/in2", f"{prefix}/i"):
        assert _prepare(whole, s3.url(output)).found is None
    assert _prepare(one, s3.url(f"{prefix}/in/out")).found is None  # one file: not read
    assert _prepare(one, str(tmp_path / "out")).found is None


def test_prepare_job_takes_a_url_inside_a_ray_job(
    s3: S3, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(f"{prefix}/in/a.parquet", pairs(tmp_path / "a.parquet").read_bytes())
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    job = _prepare(s3.url(f"{prefix}/in"), s3.url(f"{prefix}/out"))
    assert job.output.path == s3.name(f"{prefix}/out")
    with pytest.raises(OutputError, match="'out' is a relative path, and inside a Ray job"):
        _prepare(s3.url(f"{prefix}/in"), "out")


def test_prepare_job_shows_no_secrets_and_knows_its_run_by_other_keys(
    s3: S3, prefix: str, tmp_path: Path
) -> None:
    s3.put(f"{prefix}/in/a.parquet", pairs(tmp_path / "a.parquet").read_bytes())
    job = _prepare(s3.url(f"{prefix}/in"), s3.url(f"{prefix}/out"))
    assert SECRET not in f"{job} {job.record}"
    assert KEY not in f"{job} {job.record}"
    job.output.create({**job.record, "fingerprint": {}})
    other = s3.url(f"{prefix}/in").replace(KEY, "AKIAOTHER")
    assert _prepare(other, s3.url(f"{prefix}/out")).found is not None
    assert "AKIAOTHER" in {request.user_key for request in s3.server.requests}


@pytest.mark.parametrize("scheme", ["https", "http", "hf"])
def test_prepare_job_refuses_an_output_that_can_only_be_read(tmp_path: Path, scheme: str) -> None:
    source = pairs(tmp_path / "a.parquet")
    with pytest.raises(OutputError, match="is a place to read from") as caught:
        _prepare(str(source), f"{scheme}://me:SECRET@h.org/out?x=SECRET")
    assert "SECRET" not in str(caught.value)
