"""items: texts, records, conversations and tables of others become what is scored, or are refused.

What would fall apart into letters or names is never scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from datasets import Dataset

from rayreward.errors import DataError
from rayreward.items import to_sample, to_samples, to_table
from rayreward.preferences import check_schema
from rayreward.types import Conversation, Failure, Sample, Status, Text

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ROWS = {"prompt": ["a ", "b "], "completion": ["c", None]}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def turns(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages)


def reason(sample: Sample) -> str:
    assert isinstance(sample, Failure)
    assert sample.status is Status.MALFORMED
    assert sample.tokens is None
    return sample.detail


@pytest.mark.parametrize(
    ("item", "sample"),
    [
        ("a", Text("", "a")),
        ("", Failure(Status.EMPTY, "the text is empty")),
        ([user("a"), assistant("b")], turns(user("a"), assistant("b"))),
        ((user("a"),), turns(user("a"))),
        ([], Failure(Status.EMPTY, "the conversation has no messages")),
        ({"text": "a"}, Text("", "a")),
        ({"prompt": "q", "completion": "a", "id": 3}, Text("q", "a")),
        ({"prompt": "q", "response": "a"}, Text("q", "a")),
        ({"prompt": [user("q")], "completion": "a"}, turns(user("q"), assistant("a"))),
        ({"messages": [user("a")], "tools": TOOLS}, Conversation((user("a"),), TOOLS)),
    ],
)
def test_item_becomes_a_sample(item: Any, sample: Sample) -> None:
    assert to_sample(item) == sample


def test_malformed_item_has_areason() -> None:
    assert reason(to_sample({"text": None})) == "text is null"
    assert reason(to_sample(["a", "b"])) == "messages[0] is of type str, not a message"


@pytest.mark.parametrize(
    "item", [{"chosen": "a", "rejected": "b"}, {"prompt": "q", "completions": ["a"]}]
)
def test_item_with_several_rewards_is_sent_elsewhere(item: Any) -> None:
    with pytest.raises(DataError) as caught:
        to_sample(item)
    message = str(caught.value)
    assert f"A record with {' and '.join(item)} has more than one reward" in message
    assert "score_table for pairs and score_completions for lists" in message


@pytest.mark.parametrize(
    "batch",
    [
        iter(["a", {"text": "b"}]),
        pd.Series(["a", "b"]),
        pl.Series(["a", "b"]),
        np.array(["a", "b"]),
        pa.array(["a", "b"]),
        pa.chunked_array([["a"], ["b"]], pa.large_string()),
        pa.array([{"text": "a"}, {"text": "b"}]),
        Dataset.from_dict({"text": ["a", "b"]})["text"],
        Dataset.from_dict({"text": ["a", "b"]}),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batch_becomes_samples(batch: Any) -> None:
    assert to_samples(batch) == [Text("", "a"), Text("", "b")]


@pytest.mark.parametrize("item", ["a text", b"a", {"prompt": "q", "completion": "a"}, {}])
def test_one_item_is_no_batch(item: Any) -> None:
    with pytest.raises(DataError, match=r"got one (str|bytes|dict)\. Put it into a list"):
        to_samples(item)


def test_a_message_alone_is_no_conversation() -> None:
    with pytest.raises(DataError, match="Pass a list of conversations"):
        to_samples([user("a"), assistant("b")])


@pytest.mark.parametrize("table", [pd.DataFrame({"text": ["a"]}), pa.table({"text": ["a"]})])
def test_table_is_sent_elsewhere(table: Any) -> None:
    with pytest.raises(DataError, match=r"got a (DataFrame|Table)\. Pass it to score_table"):
        to_samples(table)


@pytest.mark.parametrize(
    "rows",
    [
        pa.table(ROWS),
        pa.RecordBatch.from_pydict(ROWS),
        pd.DataFrame(ROWS),
        pl.DataFrame(ROWS),
        Dataset.from_dict({name: column[::-1] for name, column in ROWS.items()}).select([1, 0]),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_tables_of_others_become_arrow_tables(rows: Any) -> None:
    table = to_table(rows)
    assert isinstance(table, pa.Table)
    assert table.to_pydict() == ROWS
    check_schema(table.schema)


@pytest.mark.parametrize("rows", [[{"text": "a"}], {"text": ["a"]}, None])
def test_what_is_no_table_is_refused(rows: Any) -> None:
    with pytest.raises(DataError, match=r"Expected a table, and got a (list|dict|NoneType)\."):
        to_table(rows)


def test_frame_with_a_column_of_several_types_is_refused() -> None:
    with pytest.raises(DataError, match=r"The DataFrame is no Arrow table: .*column text"):
        to_table(pd.DataFrame({"text": ["a", 3]}))


@pytest.mark.parametrize("item", [None, 3, b"a", 0.5, {"a", "b"}])
def test_item_of_another_type_is_refused(item: Any) -> None:
    with pytest.raises(DataError) as caught:
        to_sample(item)
    message = str(caught.value)
    assert type(item).__name__ in message
    assert "Pass texts, records such as" in message
    assert "or conversations (lists of messages)." in message


@pytest.mark.parametrize("item", [{}, {"prompt": "q"}, {1: "a"}])
def test_record_of_no_format_is_refused(item: Any) -> None:
    with pytest.raises(DataError, match="No known row format in the columns"):
        to_sample(item)
