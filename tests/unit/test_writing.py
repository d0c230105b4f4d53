"""writing: attempts become parts, once each; what is not ours is never touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from rayreward.attempts import write_attempt
from rayreward.errors import OutputError
from rayreward.types import Attempt, Tally
from rayreward.writing import OutputDirectory

TALLY = Tally(rows=3, failed={"empty": 1}, rewards=2, tokens=7, pairs=2, wins=1, margin_sum=0.1)


def _table(first: int = 0) -> pa.Table:
    return pa.table({"text": [f"row {first + i}" for i in range(3)], "reward": [0.5, None, -1.0]})


def _attempt(output: OutputDirectory, shard: int, name: str | None = None) -> Attempt:
    path = output.attempts / (name or f"{shard}-x.parquet")
    return write_attempt(str(path), shard, _table(3 * shard), TALLY)


def _started(path: Path) -> OutputDirectory:
    output = OutputDirectory(str(path))
    output.create({"run": 1})
    return output


def _resumed(path: Path) -> OutputDirectory:
    output = OutputDirectory(str(path))
    output.resume(10)
    return output


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_output_goes_from_attempts_to_parts_to_success(tmp_path: Path) -> None:
    output = _started(tmp_path / "a" / "out")
    assert _files(output.path) == ["_rayreward/plan.json"]
    for shard in (1, 0):
        assert output.promote(_attempt(output, shard))
    assert [part.name for part in output.parts] == ["part-000000.parquet", "part-000001.parquet"]
    assert not output.finished
    output.finish({"rows": 6})
    assert output.finished
    assert _files(output.path) == [
        "_SUCCESS",
        "_manifest.json",
        "_rayreward/ledger.jsonl",
        "_rayreward/plan.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    assert json.loads((output.path / "_manifest.json").read_text()) == {"rows": 6}


def test_output_is_nowhere_before_create(tmp_path: Path) -> None:
    output = OutputDirectory(str(tmp_path / "out"))
    assert output.existing_plan() is None
    assert not output.finished
    assert output.parts == []
    assert list(tmp_path.iterdir()) == []


def test_output_finished_reads_as_one_dataset(tmp_path: Path) -> None:
    output = _started(tmp_path)
    for shard in (2, 0, 1):
        output.promote(_attempt(output, shard))
    (output.attempts / "torn.parquet").write_bytes(b"PAR1")
    output.finish({})
    assert not output.attempts.exists()
    dataset = ds.dataset(tmp_path, format="parquet")
    assert [Path(path).name for path in dataset.files] == [part.name for part in output.parts]
    assert dataset.to_table()["text"].to_pylist() == [f"row {i}" for i in range(9)]
    assert pq.read_table(tmp_path).num_rows == 9


def test_promote_takes_the_first_attempt_and_throws_the_late_one_away(tmp_path: Path) -> None:
    output = _started(tmp_path)
    first, late = _attempt(output, 0, "first"), _attempt(output, 0, "late")
    assert output.promote(first)
    committed = (tmp_path / "part-000000.parquet").read_bytes()
    assert not output.promote(late)
    assert (tmp_path / "part-000000.parquet").read_bytes() == committed
    assert list(output.attempts.iterdir()) == []
    assert not output.promote(late)  # and once more, when it is already gone
    ledger = (tmp_path / "_rayreward" / "ledger.jsonl").read_text()
    assert len(ledger.splitlines()) == len(output.parts) == 1


def test_promote_an_attempt_that_is_gone(tmp_path: Path) -> None:
    output = _started(tmp_path)
    attempt = _attempt(output, 0)
    os.unlink(attempt.path)
    with pytest.raises(OutputError, match=r"Committing part-000000\.parquet .* No such file"):
        output.promote(attempt)
    assert output.parts == []
    assert output.promote(_attempt(output, 0))


def test_promote_without_room_for_the_ledger(tmp_path: Path) -> None:
    output = _started(tmp_path)
    (tmp_path / "_rayreward" / "ledger.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"Committing part-000000\.parquet .* No space left"):
        output.promote(_attempt(output, 0))
    assert output.parts == []


def test_resume_takes_up_what_the_ledger_has(tmp_path: Path) -> None:
    output = _started(tmp_path)
    for shard in (2, 0):
        output.promote(_attempt(output, shard))
    _attempt(output, 1, "open")
    again = _resumed(tmp_path)
    assert again.parts == output.parts
    assert again.parts[0].tally == TALLY
    assert list(again.attempts.iterdir()) == []
    assert not again.promote(_attempt(again, 0))
    assert again.promote(_attempt(again, 1))
    assert [part.shard for part in _resumed(tmp_path).parts] == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"shard": 1, "na', '{"shard": 1, "na\n', "\0\0\0\0", "\n\n"])
def test_resume_ignores_a_torn_line(tmp_path: Path, torn: str) -> None:
    output = _started(tmp_path)
    output.promote(_attempt(output, 0))
    with open(tmp_path / "_rayreward" / "ledger.jsonl", "a") as ledger:
        ledger.write(torn)
    again = _resumed(tmp_path)
    assert [part.shard for part in again.parts] == [0]
    assert again.promote(_attempt(again, 1))
    assert [part.shard for part in _resumed(tmp_path).parts] == [0, 1]


def test_resume_ignores_parts_that_are_not_what_the_ledger_says(tmp_path: Path) -> None:
    output = _started(tmp_path)
    for shard in range(3):
        output.promote(_attempt(output, shard))
    with open(tmp_path / "part-000000.parquet", "ab") as part:
        part.write(b"\0")
    (tmp_path / "part-000001.parquet").unlink()
    again = _resumed(tmp_path)
    assert [part.shard for part in again.parts] == [2]
    for shard in (0, 1):
        assert again.promote(_attempt(again, shard))
    assert _resumed(tmp_path).parts == output.parts


def test_resume_ignores_a_part_that_no_ledger_knows(tmp_path: Path) -> None:
    # the process died between moving the file and noting it
    output = _started(tmp_path)
    os.replace(_attempt(output, 0).path, tmp_path / "part-000000.parquet")
    again = _resumed(tmp_path)
    assert again.parts == []
    assert again.promote(_attempt(again, 0))


def test_resume_a_run_that_got_no_further_than_its_plan(tmp_path: Path) -> None:
    _started(tmp_path)
    (tmp_path / "_rayreward" / "attempts").rmdir()
    again = _resumed(tmp_path)
    assert again.parts == []
    assert again.promote(_attempt(again, 0))


def test_create_over_a_run_that_was_cut_off_before_it_had_a_plan(tmp_path: Path) -> None:
    """Its disk was full, or it was clearing an older run away: some of that is still there."""
    cut_off = _started(tmp_path)
    assert cut_off.promote(_attempt(cut_off, 0))
    (tmp_path / "part-000000.parquet").unlink()
    (tmp_path / "_rayreward" / "plan.json").rename(tmp_path / "_rayreward" / "plan.json.tmp")
    output = OutputDirectory(str(tmp_path))
    assert output.existing_plan() is None
    output.create({})
    assert _files(tmp_path / "_rayreward") == ["plan.json"]


def test_existing_plan_is_the_one_that_was_created(tmp_path: Path) -> None:
    plan = {"run": 1, "files": [{"path": "/ä"}], "seed": None}
    OutputDirectory(str(tmp_path)).create(plan)
    assert OutputDirectory(str(tmp_path)).existing_plan() == plan


@pytest.mark.parametrize("name", ["notes.txt", "part-000000.parquet", "_SUCCESS", ".hidden"])
def test_existing_plan_refuses_a_directory_of_others(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(OutputError, match="already has other files in it"):
        OutputDirectory(str(tmp_path)).existing_plan()
    assert _files(tmp_path) == [name]


def test_existing_plan_takes_an_empty_directory(tmp_path: Path) -> None:
    assert OutputDirectory(str(tmp_path)).existing_plan() is None


def test_existing_plan_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="already has other files in it"):
        OutputDirectory(str(tmp_path / "out")).existing_plan()
    assert (tmp_path / "out").read_text() == "mine"


def test_existing_plan_that_can_not_be_read(tmp_path: Path) -> None:
    _started(tmp_path)
    (tmp_path / "_rayreward" / "plan.json").write_text("{")
    with pytest.raises(OutputError, match="can't be read"):
        OutputDirectory(str(tmp_path)).existing_plan()


def test_create_where_there_can_be_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written to: (Not a directory|File exists)"):
        OutputDirectory(str(tmp_path / "file" / "out")).create({})


def test_clear_removes_only_what_is_ours(tmp_path: Path) -> None:
    output = _started(tmp_path)
    output.promote(_attempt(output, 0))
    output.finish({})
    mine = ["notes.txt", "model.parquet", "sub/part-000000.parquet", "_other/x", "_manifest.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    OutputDirectory(str(tmp_path)).clear()
    assert _files(tmp_path) == sorted(mine)


def test_clear_where_nothing_is(tmp_path: Path) -> None:
    OutputDirectory(str(tmp_path / "out")).clear()
    assert list(tmp_path.iterdir()) == []


def test_finish_is_marked_last(tmp_path: Path) -> None:
    output = _started(tmp_path)
    (tmp_path / "_manifest.json").mkdir()
    (tmp_path / "_manifest.json" / "in the way").touch()
    with pytest.raises(OutputError, match="Finishing .* failed: .* The same command finishes it"):
        output.finish({})
    assert not output.finished


def test_output_paths_start_at_home_and_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert OutputDirectory("~/out").path == OutputDirectory("out").path == tmp_path / "out"
