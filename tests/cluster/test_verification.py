"""`rayreward verify`: an output that is what it says passes; anything else is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayreward import OutputError, RewardPool, cli
from rayreward.verification import Verification, verify_output

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def outputs(pool: RewardPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished outputs: each kind of row, rows with flaws, a model that runs padded."""
    from tiny import make_checkpoint

    root = tmp_path_factory.mktemp("outputs")
    texts = [f"good {n} " * (n % 9 + 1) for n in range(120)]
    tables = {
        "single": pa.table({"text": texts}),
        "pair": pa.table({"id": range(120), "chosen": texts, "rejected": texts[::-1]}),
        "completions": pa.table(
            {"prompt": texts, "completions": [texts[n : n + n % 4] for n in range(120)]}
        ),
        "flawed": pa.table({"text": ["fine", None, "", "x" * 5_000]}),
    }
    for name, table in tables.items():
        pq.write_table(table, root / f"{name}.parquet")
        pool.score_dataset(root / f"{name}.parquet", root / name, rows_per_shard=32)
    bloom = str(make_checkpoint(root / "model", "bloom"))
    with RewardPool(bloom, seed=42, num_actors=1, num_cpus_per_actor=1) as padded:
        padded.score_dataset(root / "pair.parquet", root / "padded", rows_per_shard=32)
    return {name: root / name for name in (*tables, "padded")}


@pytest.fixture
def output(outputs: dict[str, Path], tmp_path: Path) -> Path:
    """An output of pairs to meddle with."""
    return Path(shutil.copytree(outputs["pair"], tmp_path / "out"))


def wrong(verification: Verification) -> list[str]:
    return [f"{f.name}: {f.detail}" for f in verification.findings if not f.ok]


def rewrite(output: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a part, and puts the new checksum where the old one was."""
    import hashlib

    table = pq.read_table(output / name)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), output / name)
    manifest = json.loads((output / "_manifest.json").read_text())
    for part in manifest["parts"]:
        if part["name"] == name:
            part["sha256"] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    (output / "_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["single", "pair", "completions", "flawed", "padded"])
@pytest.mark.parametrize("sample", [10, 1_000])
def test_g1_finished_output_is_verified(outputs: dict[str, Path], name: str, sample: int) -> None:
    """On two threads here, one in the actors: bits of padded batches may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verification = verify_output(str(outputs[name]), sample=sample)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert wrong(verification) == []
    assert [f.name for f in verification.findings] == ["files", "rows", "model", "rewards"]
    assert "an untrained head, drawn from a seed" in str(verification)
    assert str(verification).endswith("\nverified")


def test_g2_one_changed_reward_is_found_and_its_row_named(output: Path) -> None:
    def nudge(table: pa.Table) -> pa.Table:
        rewards = table["reward_chosen"].to_pylist()
        rewards[5] += 1e-6
        index = table.column_names.index("reward_chosen")
        return table.set_column(index, table.schema.field(index), [pa.array(rewards, pa.float32())])

    rewrite(output, "part-000002.parquet", nudge)
    [found] = wrong(verify_output(str(output), sample=1_000))
    assert found.startswith(
        "rewards: row 69 (part-000002.parquet, row 5) differs: reward_chosen is"
    )


def test_changed_bytes_are_found(output: Path) -> None:
    part = output / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    found = wrong(verify_output(str(output)))
    assert found == ["files: part-000001.parquet is not what its checksum says"]


def test_missing_and_additional_parts_are_found(output: Path) -> None:
    (output / "part-000001.parquet").rename(output / "part-000009.parquet")
    assert "files: part-000001.parquet is missing" in wrong(verify_output(str(output)))
    shutil.copy(output / "part-000009.parquet", output / "part-000001.parquet")
    found = wrong(verify_output(str(output)))
    assert found == ["files: part-000009.parquet is not in the manifest"]


def test_rows_that_were_planned_and_are_not_there_are_found(output: Path) -> None:
    rewrite(output, "part-000001.parquet", lambda table: table.slice(1))
    found = wrong(verify_output(str(output)))
    assert found == ["rows: part-000001.parquet has 31 rows, planned were 32"]
    manifest = json.loads((output / "_manifest.json").read_text())
    del manifest["parts"][1]
    (output / "_manifest.json").write_text(json.dumps(manifest))
    (output / "part-000001.parquet").unlink()
    found = wrong(verify_output(str(output)))
    assert found == ["rows: part-000001.parquet has no rows, planned were 32"]


def test_g1_another_checkpoint_is_found(output: Path, tmp_path: Path) -> None:
    from tiny import make_checkpoint

    other = make_checkpoint(tmp_path / "other", weights_seed=2)
    found = wrong(verify_output(str(output), model=str(other)))
    assert found[0].startswith(
        "model: the checkpoint is not the one that scored this: another body"
    )
    assert found[1].startswith("rewards: row ")


def test_checkpoint_that_has_moved_is_taken_from_its_new_place(
    output: Path, tiny_model: str, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert verify_output(str(output), model=str(moved)).ok


def change_provenance(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes it in the manifest and in every part."""
    manifest = json.loads((output / "_manifest.json").read_text())
    change(manifest["provenance"])
    (output / "_manifest.json").write_text(json.dumps(manifest))
    metadata = {b"rayreward": json.dumps(manifest["provenance"], sort_keys=True)}
    for part in manifest["parts"]:
        table = pq.read_table(output / part["name"])
        pq.write_table(table.replace_schema_metadata(metadata), output / part["name"])
        rewrite(output, part["name"], lambda table: table)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: made["fingerprint"].pop("compiled"), "'compiled'"),
        (lambda made: made["settings"].update(turbo=True), "'turbo'"),
    ],
    ids=["fewer", "more"],
)
def test_output_of_a_version_that_tells_other_things_is_refused(
    output: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change_provenance(output, change)
    with pytest.raises(OutputError, match=f"{reason}.*Verify it with that version"):
        verify_output(str(output))


def test_other_hardware_is_told_from_another_model(output: Path) -> None:
    def elsewhere(provenance: dict[str, Any]) -> None:
        provenance["fingerprint"]["probe"][0] += 1e-7
        provenance["fingerprint"]["environment"]["cpu"] = "ANOTHER"

    change_provenance(output, elsewhere)
    [found] = wrong(verify_output(str(output)))
    assert found.startswith("model: same weights, but this hardware computes other bits: another")
    assert "then ANOTHER" in found


def test_unfinished_run_is_no_output_to_verify(output: Path, tmp_path: Path) -> None:
    (output / "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="did not come to its end"):
        verify_output(str(output))
    with pytest.raises(OutputError, match="is no finished output"):
        verify_output(str(tmp_path))


def test_verify_command(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(output), "--sample", "7"]) == 0
    out = capsys.readouterr().out
    assert "files     ok   4 parts are what their checksums say" in out
    assert "rewards   ok   7 rows scored again have the same bits (of 120)" in out
    assert cli.main(["verify", str(output), "--all"]) == 0
    assert "rewards   ok   120 rows scored again" in capsys.readouterr().out
    (output / "part-000000.parquet").unlink()
    assert cli.main(["verify", str(output)]) == 1
    assert "files     WRONG part-000000.parquet is missing" in capsys.readouterr().out
    assert cli.main(["verify", str(output / "nowhere")]) == 1
    assert "is no finished output" in capsys.readouterr().err
