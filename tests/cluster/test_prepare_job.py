"""prepare_job: whatever is wrong with input or output is found before a byte is written.

It lies here since `rayreward.job` imports Ray; none of these tests starts it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayreward.config import JobConfig, ModelConfig
from rayreward.errors import DataError, OutputError
from rayreward.job import PreparedJob, prepare_job
from rayreward.writing import OutputDirectory

MODEL = ModelConfig(model="m", seed=42)
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def _outside_of_ray_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_RAY_JOB, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dataset of one file with ten texts."""
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(10)]}), path)
    return path


def _prepare(
    source: Path | str, output: Path | str, model: ModelConfig = MODEL, **settings: Any
) -> PreparedJob:
    config = JobConfig(dataset=str(source), output=str(output), **settings)
    return prepare_job(config, model)


def _begin(source: Path, output: Path, model: ModelConfig = MODEL, **settings: Any) -> None:
    """Leaves behind what a run leaves that was ended at once."""
    job = _prepare(source, output, model, **settings)
    job.output.create({**job.record, "fingerprint": {"head": "h"}})


def _tree(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_prepare_job_writes_nothing_and_needs_no_cluster(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray, "init")
    before = _tree(tmp_path)
    job = _prepare(source, tmp_path / "out", rows_per_shard=4)
    assert [shard.rows for shard in job.plan.shards] == [4, 4, 2]
    assert job.found is None
    assert _tree(tmp_path) == before


def test_prepare_job_recognises_the_same_run(tmp_path: Path, source: Path) -> None:
    _begin(source, tmp_path / "out")
    before = _tree(tmp_path)
    again = _prepare(source, tmp_path / "out")
    assert again.found is not None
    assert again.found["fingerprint"] == {"head": "h"}
    assert _tree(tmp_path) == before


def test_prepare_job_record_survives_json(tmp_path: Path, source: Path) -> None:
    record = _prepare(source, tmp_path / "out").record
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"model": "n"}, "model was 'm' and is 'n'"),
        ({"dtype": "bfloat16"}, "dtype was 'auto' and is 'bfloat16'"),
        ({"max_length": 9}, "max_length was None and is 9"),
        ({"seed": 7, "max_length": 9}, "seed was 42 and is 7; max_length was None and is 9"),
    ],
)
def test_prepare_job_refuses_the_output_of_another_run(
    tmp_path: Path, source: Path, changes: dict[str, Any], told: str
) -> None:
    _begin(source, tmp_path / "out")
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=rf"belongs to another run: {told}\. Choose another"):
        _prepare(source, tmp_path / "out", dataclasses.replace(MODEL, **changes))
    assert _tree(tmp_path) == before


def test_prepare_job_refuses_other_shards(tmp_path: Path, source: Path) -> None:
    _begin(source, tmp_path / "out", rows_per_shard=5)
    with pytest.raises(OutputError, match="rows_per_shard was 5 and is 3"):
        _prepare(source, tmp_path / "out", rows_per_shard=3)


def test_prepare_job_refuses_an_input_that_has_changed(tmp_path: Path, source: Path) -> None:
    _begin(source, tmp_path / "out")
    os.utime(source, ns=(0, 1))
    with pytest.raises(OutputError, match="its input files are others, or have changed"):
        _prepare(source, tmp_path / "out")
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), source)
    with pytest.raises(OutputError, match="its input files .*; columns was .* and is .*; rows was"):
        _prepare(source, tmp_path / "out")


def test_prepare_job_refuses_other_input(tmp_path: Path, source: Path) -> None:
    _begin(source, tmp_path / "out")
    other = source.with_name("b.parquet")
    other.write_bytes(source.read_bytes())
    for dataset in (other, source.parent):
        with pytest.raises(OutputError, match="its input files are others, or have changed"):
            _prepare(dataset, tmp_path / "out")


def test_prepare_job_takes_another_runs_output_when_told_to_restart(
    tmp_path: Path, source: Path
) -> None:
    _begin(source, tmp_path / "out")
    before = _tree(tmp_path)
    other = dataclasses.replace(MODEL, seed=7)
    job = _prepare(source, tmp_path / "out", other, restart=True)
    assert job.found is not None
    assert job.found["settings"]["seed"] == 42
    assert _tree(tmp_path) == before


def test_prepare_job_never_restarts_in_a_directory_of_others(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(OutputError, match="already has other files in it"):
            _prepare(source, tmp_path / "out", restart=restart)


@pytest.mark.parametrize("below", ["out", "out/deeper"])
def test_prepare_job_refuses_an_output_within_the_input(
    tmp_path: Path, source: Path, below: str
) -> None:
    (tmp_path / "link").symlink_to(source.parent)
    for directory in (source.parent, tmp_path / "link"):
        with pytest.raises(OutputError, match="lies inside the input directory"):
            _prepare(source.parent, directory / below)
        with pytest.raises(OutputError, match="lies inside the input directory"):
            _prepare(directory, source.parent / below)


def test_prepare_job_takes_an_output_beside_the_input(tmp_path: Path, source: Path) -> None:
    for output in (tmp_path / "in2", source.parent.with_name("i"), source.parent / "out"):
        _prepare(source, output)  # one file: what lies beside it is not read


@pytest.mark.parametrize("restart", [False, True])
def test_prepare_job_refuses_an_input_within_the_output(
    tmp_path: Path, source: Path, restart: bool
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for dataset in (source, source.parent, f"{source.parent}/*.parquet", tmp_path / "link" / "in"):
        for output in (source.parent, tmp_path, tmp_path / "link"):
            with pytest.raises(OutputError, match="lies inside"):
                _prepare(dataset, output, restart=restart)
    assert source.exists()


def test_prepare_job_refuses_its_own_output_as_input(tmp_path: Path, source: Path) -> None:
    output = OutputDirectory(str(tmp_path / "out"))
    output.create({})
    (output.path / "part-000000.parquet").write_bytes(source.read_bytes())
    with pytest.raises(OutputError, match="lies inside"):
        _prepare(output.path, output.path, restart=True)


def test_prepare_job_refuses_a_relative_output_inside_a_ray_job(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _prepare(source, "out").output.path == tmp_path / "out"
    monkeypatch.setenv(IN_RAY_JOB, "{}")
    with pytest.raises(OutputError, match="'out' is a relative path, and inside a Ray job"):
        _prepare(source, "out")
    for output in (tmp_path / "out", "~/out"):
        assert _prepare(source, output).output.path == tmp_path / "out"


def test_prepare_job_finds_what_is_wrong_with_the_input_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        _prepare(tmp_path / "no.parquet", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
