"""preferences: each row format is found, and each row becomes what it asks to score, or a reason.

Nothing is made up: a null, a wrong type or a missing field is a failure with a reason.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from rayreward.errors import DataError
from rayreward.preferences import (
    RowFormat,
    RowKind,
    check_schema,
    find_format,
    is_conversational,
)
from rayreward.types import Conversation, Failure, Sample, Status, Text

TEXT = pa.string()
MESSAGE = pa.struct([("role", TEXT), ("content", TEXT)])
MESSAGES = pa.list_(MESSAGE)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
PART = {"type": "text", "text": "see"}
IMAGE = {"type": "image", "url": "u"}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _samples(**row: Any) -> tuple[Sample, ...]:
    """What a row with these columns asks to score."""
    return find_format(row).samples(row)


def _sample(**row: Any) -> Sample:
    (sample,) = _samples(**row)
    return sample


def _turns(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages)


def _reason(sample: Sample) -> str:
    assert isinstance(sample, Failure)
    assert sample.status is Status.MALFORMED
    assert sample.tokens is None
    return sample.detail


# ---- finding the format


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("prompt", "chosen", "rejected"), RowKind.PAIR),
        (("chosen", "rejected"), RowKind.PAIR),
        (("prompt", "completions"), RowKind.COMPLETIONS),
        (("prompt", "completion"), RowKind.SINGLE),
        (("prompt", "response"), RowKind.SINGLE),
        (("messages",), RowKind.SINGLE),
        (("text",), RowKind.SINGLE),
    ],
)
def test_preferences_find_each_format_among_other_columns(
    columns: tuple[str, ...], kind: RowKind
) -> None:
    for names in (columns, tuple(reversed(columns)), ("id", *columns, "score")):
        assert find_format(names) == RowFormat(kind, columns)


def test_preferences_try_the_formats_in_order_of_precedence() -> None:
    names = ["text", "messages", "response", "completion", "completions", "rejected", "chosen"]
    names.append("prompt")
    found = []
    for dropped in ("chosen", "completions", "completion", "response", "messages", None):
        found.append(find_format(names).columns)
        if dropped is not None:
            names.remove(dropped)
    assert found == [
        ("prompt", "chosen", "rejected"),
        ("prompt", "completions"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("messages",),
        ("text",),
    ]


def test_preferences_read_the_extras_of_the_chat_template() -> None:
    found = find_format(["tools", "chosen", "rejected", "chat_template_kwargs", "source"])
    assert found.extras == ("tools", "chat_template_kwargs")
    assert found.read == ("chosen", "rejected", "tools", "chat_template_kwargs")


@pytest.mark.parametrize(
    "columns", [("prompt",), ("chosen",), ("prompt", "rejected"), ("completion",), ("Text", "id")]
)
def test_preferences_unknown_columns_are_listed_beside_the_accepted(
    columns: tuple[str, ...],
) -> None:
    with pytest.raises(DataError) as caught:
        find_format(columns)
    message = str(caught.value)
    assert f"in the columns {', '.join(columns)}. Accepted: " in message
    for accepted in (
        "chosen + rejected (+ prompt)",
        "prompt + completions",
        "prompt + completion",
        "prompt + response",
        "messages",
        "text",
    ):
        assert f"{accepted}," in message or f"or {accepted}." in message
    assert message.endswith("Rename the columns to one of these.")


def test_preferences_no_columns_are_called_none() -> None:
    with pytest.raises(DataError, match=r"in the columns \(none\)\. Accepted: "):
        find_format([])


# ---- plain text


def test_preferences_pair_of_texts_with_explicit_prompt() -> None:
    assert _samples(prompt="q ", chosen="good", rejected="bad") == (
        Text("q ", "good"),
        Text("q ", "bad"),
    )


def test_preferences_pair_of_texts_with_implicit_prompt() -> None:
    assert _samples(chosen="q good", rejected="q bad") == (Text("", "q good"), Text("", "q bad"))


@pytest.mark.parametrize("column", ["completion", "response"])
def test_preferences_prompt_and_one_text(column: str) -> None:
    assert _sample(**{"prompt": "q ", column: "a"}) == Text("q ", "a")


def test_preferences_prompt_and_several_texts() -> None:
    found = _samples(prompt="q ", completions=["a", "", "c"])
    assert found == (Text("q ", "a"), Text("q ", ""), Text("q ", "c"))


def test_preferences_one_text() -> None:
    assert _sample(text=" as it is\n") == Text("", " as it is\n")


def test_preferences_whole_texts_leave_a_prompt_beside_them_alone() -> None:
    assert _sample(prompt="q", text="q a") == Text("", "q a")
    assert _sample(prompt="q", messages=[_user("a")]) == _turns(_user("a"))


# ---- conversations


def test_preferences_pair_of_conversations_with_explicit_prompt() -> None:
    history = [_user("a"), _assistant("b"), _user("c")]
    assert _samples(prompt=history, chosen=[_assistant("d")], rejected=[_assistant("e")]) == (
        _turns(*history, _assistant("d")),
        _turns(*history, _assistant("e")),
    )


def test_preferences_pair_of_conversations_with_implicit_prompt() -> None:
    chosen, rejected = [_user("a"), _assistant("b")], [_user("a"), _assistant("c")]
    assert _samples(chosen=chosen, rejected=rejected) == (_turns(*chosen), _turns(*rejected))


def test_preferences_whole_conversation() -> None:
    talk = [{"role": "system", "content": "s"}, _user("a"), _assistant("b")]
    assert _sample(messages=talk) == _turns(*talk)


def test_preferences_prompt_and_several_conversations() -> None:
    found = _samples(prompt=[_user("a")], completions=[[_assistant("b")], [_assistant("c")]])
    assert found == (_turns(_user("a"), _assistant("b")), _turns(_user("a"), _assistant("c")))


# ---- strings beside lists


def test_preferences_text_after_a_conversation_is_the_answer() -> None:
    assert _sample(prompt=[_user("a")], completion="b") == _turns(_user("a"), _assistant("b"))
    assert _samples(prompt=[_user("a")], completions=["b", "c"]) == (
        _turns(_user("a"), _assistant("b")),
        _turns(_user("a"), _assistant("c")),
    )


def test_preferences_text_before_a_conversation_is_the_question() -> None:
    assert _sample(prompt="a", completion=[_assistant("b")]) == _turns(_user("a"), _assistant("b"))


def test_preferences_text_that_the_conversation_repeats_is_not_said_twice() -> None:
    chosen, rejected = [_user("a"), _assistant("b")], [_user("a"), _assistant("c")]
    found = _samples(
        prompt="a", prompt_id="0", chosen=chosen, rejected=rejected, messages=chosen, score=9.0
    )
    assert found == (_turns(*chosen), _turns(*rejected))


def test_preferences_repeated_text_may_follow_a_system_message() -> None:
    talk = [{"role": "system", "content": "s"}, _user("a"), _assistant("b")]
    assert _sample(prompt="a", completion=talk) == _turns(*talk)


def test_preferences_text_that_an_answer_repeats_is_still_the_question() -> None:
    assert _sample(prompt="a", completion=[_assistant("a")]) == _turns(_user("a"), _assistant("a"))


def test_preferences_text_that_is_said_again_later_is_still_the_question() -> None:
    later = [_assistant("b"), _user("Go on."), _assistant("c")]
    assert _sample(prompt="Go on.", completion=later) == _turns(_user("Go on."), *later)


def test_preferences_pair_may_mix_text_and_conversation() -> None:
    assert _samples(prompt="a", chosen="b", rejected=[_assistant("c")]) == (
        Text("a", "b"),
        _turns(_user("a"), _assistant("c")),
    )


# ---- empty


@pytest.mark.parametrize(
    "row", [{"text": ""}, {"prompt": "", "completion": ""}, {"prompt": "", "response": ""}]
)
def test_preferences_empty_text_is_a_failure(row: dict[str, str]) -> None:
    assert _sample(**row) == Failure(Status.EMPTY, "the text is empty")


@pytest.mark.parametrize("row", [{"messages": []}, {"prompt": [], "completion": []}])
def test_preferences_empty_conversation_is_a_failure(row: dict[str, Any]) -> None:
    assert _sample(**row) == Failure(Status.EMPTY, "the conversation has no messages")


def test_preferences_empty_side_of_a_pair_leaves_the_other() -> None:
    chosen, rejected = _samples(chosen="", rejected="b")
    assert isinstance(chosen, Failure)
    assert chosen.status is Status.EMPTY
    assert rejected == Text("", "b")


def test_preferences_no_completions_are_no_samples() -> None:
    assert _samples(prompt="q", completions=[]) == ()


# ---- nulls and malformed values


@pytest.mark.parametrize("prompt", ["q", [_user("q")]])
@pytest.mark.parametrize("column", ["completion", "response"])
def test_preferences_null_completion_has_a_reason(prompt: Any, column: str) -> None:
    assert _reason(_sample(**{"prompt": prompt, column: None})) == f"{column} is null"


@pytest.mark.parametrize("completion", ["a", [_assistant("a")]])
def test_preferences_null_prompt_has_a_reason(completion: Any) -> None:
    assert _reason(_sample(prompt=None, completion=completion)) == "prompt is null"


@pytest.mark.parametrize("column", ["text", "messages"])
def test_preferences_null_text_has_a_reason(column: str) -> None:
    assert _reason(_sample(**{column: None})) == f"{column} is null"


def test_preferences_null_side_of_a_pair_leaves_the_other() -> None:
    chosen, rejected = _samples(prompt="q", chosen="a", rejected=None)
    assert chosen == Text("q", "a")
    assert _reason(rejected) == "rejected is null"


def test_preferences_null_prompt_of_a_pair_fails_both_sides() -> None:
    assert [_reason(sample) for sample in _samples(prompt=None, chosen="a", rejected="b")] == [
        "prompt is null",
        "prompt is null",
    ]


def test_preferences_null_completions_are_one_failure() -> None:
    row = {"prompt": "q", "completions": None}
    whole_row = find_format(row).samples(row)
    assert isinstance(whole_row, Failure)
    assert _reason(whole_row) == "completions is null"


def test_preferences_null_among_completions_keeps_its_place() -> None:
    first, second, third = _samples(prompt="q", completions=["a", None, "c"])
    assert (first, third) == (Text("q", "a"), Text("q", "c"))
    assert _reason(second) == "completions[1] is null"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "messages[1] is of type str, not a message"),
        (None, "messages[1] is of type NoneType, not a message"),
        ({"content": "b"}, "messages[1] has no role"),
        ({"role": None, "content": "b"}, "messages[1] has no role"),
        ({"role": 1, "content": "b"}, "messages[1] has no role"),
        ({"role": "user"}, "messages[1] has no content"),
        ({"role": "user", "content": None}, "messages[1] has no content"),
        (_user(7), "messages[1] has a content that is neither text nor a list of parts"),
        (_user(b"b"), "messages[1] has a content that is neither text nor a list of parts"),
        (_user(["b"]), "messages[1].content[0] is of type str, not a part"),
        (
            _user([PART, IMAGE]),
            "messages[1].content[1] is of type 'image', and only text is scored",
        ),
    ],
)
def test_preferences_malformed_message_has_a_reason(message: Any, reason: str) -> None:
    assert _reason(_sample(messages=[_user("a"), message])) == reason


def test_preferences_malformed_message_is_found_in_its_column() -> None:
    broken = [{"content": "b"}]
    _, rejected = _samples(chosen=[_user("a")], rejected=broken)
    assert _reason(rejected) == "rejected[0] has no role"
    assert _reason(_sample(prompt=broken, completion="b")) == "prompt[0] has no role"
    _, second = _samples(prompt="q", completions=["a", broken])
    assert _reason(second) == "completions[1][0] has no role"


@pytest.mark.parametrize("value", [7, {"role": "user", "content": "a"}, b"bytes"])
def test_preferences_value_of_another_type_has_a_reason(value: Any) -> None:
    name = type(value).__name__
    reason = f"is of type {name}, not text or messages"
    assert _reason(_sample(prompt="q", completion=value)) == f"completion {reason}"
    assert _reason(_sample(prompt=value, completion="a")) == f"prompt {reason}"


def test_preferences_content_may_be_a_list_of_parts() -> None:
    talk = [_user([PART]), _assistant("b")]
    assert _sample(messages=talk) == _turns(*talk)
    assert _sample(prompt=PART["text"], completion=talk) == _turns(*talk), "the prompt is repeated"


def test_preferences_call_of_a_tool_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert _sample(messages=[_user("a"), call | {"content": None}]) == _turns(_user("a"), call)


# ---- what goes to the chat template


def test_preferences_tools_may_be_a_json_string() -> None:
    talk = [_user("a"), _assistant("b")]
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert _sample(messages=talk, tools=tools) == Conversation(tuple(talk), TOOLS)


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_preferences_no_tools_are_none(tools: Any) -> None:
    assert _sample(messages=[_user("a")], tools=tools) == _turns(_user("a"))


def test_preferences_tools_that_are_not_json_have_a_reason() -> None:
    assert _reason(_sample(messages=[_user("a")], tools="[oops")).startswith("tools is not JSON: ")


def test_preferences_template_kwargs_are_handed_on_without_nulls() -> None:
    row = {"messages": [_user("a")], "chat_template_kwargs": {"thinking": False, "date": None}}
    assert _sample(**row) == Conversation((_user("a"),), None, {"thinking": False})
    assert _sample(messages=[_user("a")], chat_template_kwargs=None) == _turns(_user("a"))


def test_preferences_tools_leave_plain_text_alone() -> None:
    assert _sample(text="a", tools=TOOLS) == Text("", "a")


def test_preferences_null_fields_of_arrow_structs_are_dropped() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}
    rows = [
        {"messages": [_user("a"), {"role": "assistant", "tool_calls": [call]}], "tools": TOOLS},
        {"messages": [_user("b"), {"role": "assistant", "tool_calls": [other]}]},
        {"messages": [{"role": "tool", "content": "3", "name": "add"}]},
    ]
    found = find_format(["messages", "tools"])
    read = pa.Table.from_pylist(rows).to_pylist()
    assert read[0]["messages"][0]["tool_calls"] is None
    assert read[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] is None
    samples = [found.samples(row)[0] for row in read]
    assert samples[0] == Conversation(tuple(rows[0]["messages"]), TOOLS)
    assert samples[1] == _turns(*rows[1]["messages"])
    assert samples[2] == _turns(*rows[2]["messages"])
    thought = {"type": "thinking", "thinking": "well"}
    parts = pa.Table.from_pylist([{"messages": [_user([PART, thought])]}]).to_pylist()[0]
    assert parts["messages"][0]["content"][0]["thinking"] is None
    assert found.samples(parts) == (_turns(_user([PART, thought])),)


# ---- the schema of a table


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_preferences_schema_takes_every_kind_of_string(kind: pa.DataType) -> None:
    assert check_schema(pa.schema([("text", kind)])).columns == ("text",)
    pair = pa.schema([("prompt", kind), ("chosen", kind), ("rejected", kind)])
    assert check_schema(pair).kind is RowKind.PAIR
    several = pa.schema([("prompt", kind), ("completions", pa.list_(kind))])
    assert check_schema(several).kind is RowKind.COMPLETIONS
    role = pa.struct([("role", kind), ("content", kind)])
    assert check_schema(pa.schema([("messages", pa.list_(role))])).kind is RowKind.SINGLE


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(MESSAGE),
        pa.large_list(MESSAGE),
        pa.list_(MESSAGE, 2),
        pa.list_view(MESSAGE),
        pa.large_list_view(MESSAGE),
    ],
)
def test_preferences_schema_takes_every_kind_of_list(kind: pa.DataType) -> None:
    for columns in (("messages",), ("chosen", "rejected"), ("prompt", "response")):
        schema = pa.schema([(name, kind) for name in columns])
        found = check_schema(schema)
        assert found.columns == columns
        assert is_conversational(schema, found)


@pytest.mark.parametrize(
    ("columns", "wrong", "wanted"),
    [
        ({"text": pa.binary()}, "text", "text"),
        ({"text": pa.null()}, "text", "text"),
        ({"text": MESSAGES}, "text", "text"),
        ({"text": pa.dictionary(pa.int8(), pa.int64())}, "text", "text"),
        ({"messages": TEXT}, "messages", "a list of messages"),
        ({"messages": MESSAGE}, "messages", "a list of messages"),
        ({"messages": pa.list_(TEXT)}, "messages", "a list of messages"),
        (
            {"messages": pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))},
            "messages",
            "a list of messages",
        ),
        ({"chosen": TEXT, "rejected": pa.int64()}, "rejected", "text or a list of messages"),
        ({"chosen": pa.list_(TEXT), "rejected": TEXT}, "chosen", "text or a list of messages"),
        (
            {"prompt": pa.int64(), "chosen": TEXT, "rejected": TEXT},
            "prompt",
            "text or a list of messages",
        ),
        ({"prompt": TEXT, "completion": MESSAGE}, "completion", "text or a list of messages"),
        ({"prompt": TEXT, "response": pa.bool_()}, "response", "text or a list of messages"),
        (
            {"prompt": TEXT, "completions": TEXT},
            "completions",
            "a list of text or a list of messages",
        ),
        (
            {"prompt": TEXT, "completions": MESSAGES},
            "completions",
            "a list of text or a list of messages",
        ),
    ],
)
def test_preferences_schema_says_which_column_should_hold_what(
    columns: dict[str, pa.DataType], wrong: str, wanted: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_schema(pa.schema(list(columns.items())))
    message = str(caught.value)
    assert message.startswith(
        f"Column {wrong!r} is of type {columns[wrong]}; it should hold {wanted}."
    )
    assert message.endswith("Convert the column, or rename it if it is another.")


def test_preferences_schema_with_unknown_columns_is_refused() -> None:
    with pytest.raises(DataError, match=r"in the columns question, answer\. Accepted: "):
        check_schema(pa.schema([("question", TEXT), ("answer", TEXT)]))


def test_preferences_schema_with_a_column_twice_is_refused() -> None:
    with pytest.raises(DataError, match="chosen"):
        check_schema(pa.schema([("chosen", TEXT), ("chosen", TEXT), ("rejected", TEXT)]))


def test_preferences_schema_leaves_other_columns_alone() -> None:
    schema = pa.schema([("text", TEXT), ("score", pa.float64()), ("raw", pa.binary())])
    assert check_schema(schema).read == ("text",)


@pytest.mark.parametrize(
    ("columns", "conversational"),
    [
        ({"text": TEXT}, False),
        ({"messages": MESSAGES}, True),
        ({"chosen": TEXT, "rejected": TEXT}, False),
        ({"prompt": MESSAGES, "completion": TEXT}, True),
        ({"prompt": TEXT, "chosen": MESSAGES, "rejected": MESSAGES}, True),
        ({"prompt": TEXT, "completions": pa.list_(TEXT)}, False),
        ({"prompt": TEXT, "completions": pa.list_(MESSAGES)}, True),
        ({"text": TEXT, "history": MESSAGES}, False),
    ],
)
def test_preferences_schema_tells_whether_a_chat_template_is_needed(
    columns: dict[str, pa.DataType], conversational: bool
) -> None:
    schema = pa.schema(list(columns.items()))
    assert is_conversational(schema, check_schema(schema)) is conversational
