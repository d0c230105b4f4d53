"""examples: both files of each format hold the same rows, and the script rebuilds them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayreward.preferences import RowKind, check_schema, is_conversational
from rayreward.types import Conversation, Text

FORMATS: dict[str, tuple[RowKind, tuple[str, ...], bool]] = {
    "preferences": (RowKind.PAIR, ("prompt", "chosen", "rejected"), True),
    "formats/pairs_conversational_implicit": (RowKind.PAIR, ("chosen", "rejected"), True),
    "formats/pairs_text": (RowKind.PAIR, ("prompt", "chosen", "rejected"), False),
    "formats/pairs_text_implicit": (RowKind.PAIR, ("chosen", "rejected"), False),
    "formats/prompt_completion": (RowKind.SINGLE, ("prompt", "completion"), True),
    "formats/prompt_response": (RowKind.SINGLE, ("prompt", "response"), False),
    "formats/prompt_completions": (RowKind.COMPLETIONS, ("prompt", "completions"), False),
    "formats/messages": (RowKind.SINGLE, ("messages",), True),
    "formats/text": (RowKind.SINGLE, ("text",), False),
}
"""For each file: the kind of its rows, the columns that are read, whether they hold messages."""


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _names(directory: Path) -> set[str]:
    files = [path for path in directory.rglob("*") if path.suffix in (".jsonl", ".parquet")]
    return {path.relative_to(directory).as_posix() for path in files}


def test_examples_are_all_known_here(examples: Path) -> None:
    assert _names(examples) == {
        f"{name}{end}" for name in FORMATS for end in (".jsonl", ".parquet")
    }


@pytest.mark.parametrize("name", FORMATS)
def test_examples_hold_the_same_rows_in_both_files(examples: Path, name: str) -> None:
    table = pq.read_table(examples / f"{name}.parquet")
    rows = _rows(examples / f"{name}.jsonl")
    assert table.to_pylist() == rows
    assert table.column_names == list(rows[0])


@pytest.mark.parametrize("name", FORMATS)
def test_examples_are_of_the_row_format_they_are_named_for(examples: Path, name: str) -> None:
    schema = pq.read_schema(examples / f"{name}.parquet")
    found = check_schema(schema)
    kind, columns, conversational = FORMATS[name]
    assert (found.kind, found.columns, found.extras) == (kind, columns, ())
    assert is_conversational(schema, found) is conversational


@pytest.mark.parametrize("name", FORMATS)
def test_examples_can_all_be_scored(examples: Path, name: str) -> None:
    found = check_schema(pq.read_schema(examples / f"{name}.parquet"))
    wanted = Conversation if FORMATS[name][2] else Text
    for row in _rows(examples / f"{name}.jsonl"):
        assert {type(sample) for sample in found.samples(row)} == {wanted}


def test_examples_ask_for_the_same_texts_in_every_format_of_pairs(examples: Path) -> None:
    def joined(name: str) -> list[str]:
        found = check_schema(pq.read_schema(examples / f"{name}.parquet"))
        samples = [s for row in _rows(examples / f"{name}.jsonl") for s in found.samples(row)]
        return [f"{s.prompt}{s.completion}" if isinstance(s, Text) else repr(s) for s in samples]

    assert joined("formats/pairs_text") == joined("formats/pairs_text_implicit")
    assert joined("formats/pairs_text") == joined("formats/prompt_response")
    assert joined("formats/pairs_text") == joined("formats/text")
    assert joined("preferences") == joined("formats/pairs_conversational_implicit")
    assert joined("preferences") == joined("formats/prompt_completion")
    assert joined("preferences") == joined("formats/messages")


def test_examples_are_enough_pairs_with_histories(examples: Path) -> None:
    rows = _rows(examples / "preferences.jsonl")
    assert len(rows) >= 64
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    assert sum(len([m for m in row["prompt"] if m["role"] == "user"]) > 1 for row in rows) >= 8


def test_examples_have_lists_of_different_lengths(examples: Path) -> None:
    rows = _rows(examples / "formats/prompt_completions.jsonl")
    assert {len(row["completions"]) for row in rows} == {2, 3}


def test_examples_are_rebuilt_byte_for_byte(examples: Path, tmp_path: Path) -> None:
    copy = tmp_path / "examples"
    copy.mkdir()
    for name in ("preferences.jsonl", "make_formats.py"):
        shutil.copyfile(examples / name, copy / name)
    command = [sys.executable, str(copy / "make_formats.py")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert _names(copy) == _names(examples)
    for name in sorted(_names(examples)):
        rebuilt, kept = copy / name, examples / name
        if name.endswith(".parquet") and _writer(rebuilt) != _writer(kept):
            assert pq.read_table(rebuilt).equals(pq.read_table(kept)), name
        else:
            assert rebuilt.read_bytes() == kept.read_bytes(), name


def _writer(path: Path) -> str:
    """Which version of pyarrow wrote a file: others may write other bytes."""
    return str(pq.read_metadata(path).created_by)
