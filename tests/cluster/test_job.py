"""The job, as its user runs it: files in, Parquet with rewards out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from files import pairs, parts

from rayreward import (
    DataError,
    JobConfig,
    ModelConfig,
    OutputError,
    RewardPool,
    Scorer,
    cli,
)
from rayreward.attempts import read_provenance
from rayreward.preferences import check_schema

pytestmark = pytest.mark.ray

Run = Callable[..., int]


@pytest.fixture
def run(ray_cluster: Any, tiny_model: str, tmp_path: Path) -> Run:
    """Runs `rayreward score` in this process, on the shared cluster."""

    def run(dataset: Path | str, *flags: str, output: Path = tmp_path / "out") -> int:
        arguments = ["--dataset", str(dataset), "--output", str(output), "--progress", "lines"]
        arguments += ["--model", tiny_model, "--num-actors", "1", "--num-cpus-per-actor", "1"]
        return cli.main(["score", *arguments, *("--seed", "42"), *flags])

    return run


def test_every_example_format_is_scored(pool: RewardPool, examples: Path, tmp_path: Path) -> None:
    files = [examples / "preferences.parquet", *sorted((examples / "formats").glob("*.jsonl"))]
    for file in files:
        report = pool.score_dataset(str(file), str(tmp_path / file.stem), max_failed_rows=10**6)
        result = pq.read_table(tmp_path / file.stem)
        assert report.tally.rows == result.num_rows > 0
        assert set(result["reward_status"].to_pylist()) <= {"ok", "too_long"}
        assert result["reward_status"].to_pylist().count("ok") > 0


def test_jsonl_and_parquet_of_the_same_rows_get_the_same_rewards(
    pool: RewardPool, examples: Path, tmp_path: Path
) -> None:
    results = []
    for kind in ("jsonl", "parquet"):
        pool.score_dataset(
            str(examples / f"preferences.{kind}"), str(tmp_path / kind), max_failed_rows=72
        )
        results.append(pq.read_table(tmp_path / kind).to_pylist())
    assert results[0] == results[1]


def test_output_has_the_inputs_rows_in_order_and_the_scorers_rewards(
    pool: RewardPool, tiny_model: str, tmp_path: Path
) -> None:
    source = pairs(tmp_path / "pairs.parquet")
    report = pool.score_dataset(str(source), str(tmp_path / "out"), rows_per_shard=25)
    table, result = pq.read_table(source), pq.read_table(tmp_path / "out")
    scorer = Scorer.load(ModelConfig(model=tiny_model, seed=42))
    expected = scorer.score_table(table, check_schema(table.schema))
    assert result.select(table.column_names).equals(table)
    for name in ("reward_chosen", "reward_rejected", "reward_margin"):
        assert result[name].to_pylist() == pytest.approx(expected[name].to_pylist(), abs=1e-6)
    wins = sum(margin > 0 for margin in result["reward_margin"].to_pylist())
    assert (report.tally.pairs, report.tally.wins) == (200, wins)
    assert report.accuracy == wins / 200


def test_output_directory_reads_as_one_dataset_with_provenance(
    pool: RewardPool, tiny_model: str, tmp_path: Path
) -> None:
    source, output = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"
    pool.score_dataset(str(source), str(output), rows_per_shard=50)
    assert ds.dataset(output, format="parquet").count_rows() == 200
    manifest = json.loads((output / "_manifest.json").read_text())
    assert {p["name"]: p["sha256"] for p in manifest["parts"]} == parts(output)
    assert (output / "_SUCCESS").exists()
    assert not (output / "_rayreward" / "attempts").exists()
    provenance = read_provenance(str(output / "part-000000.parquet"))
    assert provenance == manifest["provenance"]
    assert provenance["fingerprint"] == pool.fingerprint.to_dict()
    assert (provenance["model"], provenance["settings"]["seed"]) == (tiny_model, 42)


def test_unfinished_run_is_resumed_and_does_the_missing_shards_only(
    pool: RewardPool, tmp_path: Path
) -> None:
    source, output = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"
    pool.score_dataset(str(source), str(output), rows_per_shard=20)
    whole, inode = parts(output), (output / "part-000000.parquet").stat().st_ino
    for name in ("_SUCCESS", "_manifest.json", "part-000003.parquet", "part-000007.parquet"):
        (output / name).unlink()
    report = pool.score_dataset(str(source), str(output), rows_per_shard=20)
    assert parts(output) == whole
    assert (output / "part-000000.parquet").stat().st_ino == inode
    assert (report.tally.rows, report.rows_before) == (200, 160)


def test_resume_with_shards_cut_elsewhere_is_refused(pool: RewardPool, tmp_path: Path) -> None:
    """As many shards, but other rows in them: parts of both cuts together would lose rows."""
    source, output = pairs(tmp_path / "pairs.parquet", rows=10), tmp_path / "out"
    pool.score_dataset(str(source), str(output), rows_per_shard=5)
    with pytest.raises(OutputError, match="rows_per_shard was 5 and is 6"):
        pool.score_dataset(str(source), str(output), rows_per_shard=6)


def test_finished_run_is_not_done_again(pool: RewardPool, tmp_path: Path) -> None:
    source, output = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"
    first = pool.score_dataset(source, output)  # paths will do as well
    manifest = (output / "_manifest.json").read_bytes()
    again = pool.score_dataset(str(source), str(output))
    assert again.tally == first.tally
    assert again.rows_before == 200
    assert (output / "_manifest.json").read_bytes() == manifest


def test_other_weights_under_the_same_name_are_another_run(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    from tiny import make_checkpoint

    source, model = pairs(tmp_path / "pairs.parquet"), tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for weights_seed, expectation in ((1, None), (2, "belongs to another run: body was")):
        make_checkpoint(model, weights_seed=weights_seed)
        with RewardPool(str(model), seed=42, num_actors=1, num_cpus_per_actor=1) as pool:
            if expectation is None:
                pool.score_dataset(str(source), str(tmp_path / "out"))
            else:
                with pytest.raises(OutputError, match=expectation):
                    pool.score_dataset(str(source), str(tmp_path / "out"))


def test_conversations_need_a_chat_template_and_nothing_is_written(
    ray_cluster: Any, examples: Path, tmp_path: Path
) -> None:
    from tiny import make_checkpoint

    model = make_checkpoint(tmp_path / "model", chat=False)
    with (
        RewardPool(str(model), seed=1, num_actors=1, num_cpus_per_actor=1) as pool,
        pytest.raises(DataError, match="no chat template"),
    ):
        pool.score_dataset(str(examples / "preferences.parquet"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_full_disk_is_an_error_and_leaves_a_resumable_output(
    ray_cluster: Any, tiny_model: str, tmp_path: Path
) -> None:
    source, output = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"

    def limit(_actor: Any, size: int) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    # one task at a time: another would still be at its own attempt
    settings: dict[str, Any] = {"num_actors": 1, "num_cpus_per_actor": 1, "tasks_per_actor": 1}
    with RewardPool(tiny_model, seed=42, **settings) as pool:
        ray_cluster.get(pool.actors[0].__ray_call__.remote(limit, 2000))
        with pytest.raises(OutputError, match="File too large.*resumes this run"):
            pool.score_dataset(str(source), str(output))
        assert list((output / "_rayreward" / "attempts").iterdir()) == []
        assert parts(output) == {}
        assert not (output / "_SUCCESS").exists()
        ray_cluster.get(pool.actors[0].__ray_call__.remote(limit, 2**40))
        assert pool.score_dataset(str(source), str(output)).tally.rows == 200


def test_bit_flipped_row_group_is_reported_and_the_others_are_scored(
    pool: RewardPool, tmp_path: Path
) -> None:
    source, output = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"
    metadata = pq.ParquetFile(source).metadata
    column = metadata.row_group(1).column(1)
    content = bytearray(source.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    source.write_bytes(bytes(content))
    report = pool.score_dataset(str(source), str(output))
    result = pq.read_table(output)
    assert result.num_rows == 200
    assert dict(report.tally.failed) == {"unreadable": 60}
    statuses = result["reward_status"].to_pylist()
    assert statuses == ["ok"] * 60 + ["unreadable"] * 60 + ["ok"] * 80
    assert result["reward_chosen"].null_count == 60
    assert result["id"].to_pylist()[120:] == list(range(120, 200))


def test_score_command_prints_a_summary(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pairs(tmp_path / "pairs.parquet")) == 0
    out, err = capsys.readouterr()
    for expected in (
        "rows         200 in",
        "failed       0",
        "accuracy",
        "200 pairs",
        "mean margin",
    ):
        assert expected in out
    assert "head         untrained: drawn from seed 42" in out
    assert "head sha256  " in out
    assert "200/200 rows (100 %)" in err


def test_score_command_ends_with_3_when_rows_fail_unless_told_that_it_is_fine(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": None, "rejected": "b"}]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(source) == 3
    assert "1 rows have no reward" in capsys.readouterr().err
    assert run(source, "--max-failed-rows", "1") == 0
    assert "failed       1 (1 malformed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-length", "257"), "positions for: 256"),
        (("--head", "trained"), "no trained head"),
        (("--model", "/nowhere/at/all"), "does not exist"),
        (("--model", str(Path(__file__).parent)), "is no checkpoint"),
    ],
)
def test_score_command_refuses_a_bad_model_and_writes_nothing(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert run(pairs(tmp_path / "pairs.parquet"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "score        Score a dataset" in capsys.readouterr().out
    assert cli.main(["nonesuch"]) == 2
    assert "fingerprint  Load a model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--seed", "-1"), ("--max-length", "100", "--max-batch-tokens", "50")]
)
def test_score_command_refuses_bad_settings(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(pairs(tmp_path / "pairs.parquet"), *flags)
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_score_command_refuses_bad_data_and_writes_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "utf8.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    cut = pairs(tmp_path / "cut.parquet").read_bytes()[:-100]
    (tmp_path / "cut.parquet").write_bytes(cut)
    for name, message in [
        ("nowhere.jsonl", "no such file"),
        ("empty.jsonl", "is empty"),
        ("columns.jsonl", "question, answer"),
        ("utf8.jsonl", "line 2 is not valid UTF-8"),
        ("cut.parquet", "not a readable Parquet file"),
    ]:
        assert run(tmp_path / name) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_flags_of_the_command_are_the_configs_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen: a flag that goes away breaks somebody's script."""
    import dataclasses

    from rayreward import PoolConfig

    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    shown = capsys.readouterr().out
    fields = [
        f for config in (ModelConfig, JobConfig, PoolConfig) for f in dataclasses.fields(config)
    ]
    missing = [f.name for f in fields if f"--{f.name.replace('_', '-')}" not in shown]
    assert missing == []
    assert sorted(field.name for field in fields) == FLAGS


FLAGS = [
    "batch_invariant",
    "dataset",
    "dtype",
    "head",
    "head_sync",
    "label_selector",
    "max_attempts",
    "max_batch_tokens",
    "max_failed_rows",
    "max_failed_share",
    "max_length",
    "min_actors",
    "mixed_hardware",
    "model",
    "num_actors",
    "num_cpus_per_actor",
    "num_gpus_per_actor",
    "output",
    "pad_token",
    "placement_timeout_s",
    "progress",
    "ray_address",
    "recheck_share",
    "restart",
    "revision",
    "rows_per_shard",
    "seed",
    "share_prefixes",
    "silent_after_s",
    "tasks_per_actor",
    "torch_compile",
    "truncation",
]
