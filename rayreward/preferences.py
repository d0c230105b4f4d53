"""The row formats of preference data, found from the columns, and what each row asks to score.

A row becomes a tuple of samples: two for a pair, one for a single text, K for a list of
completions. Knows column names and Python values; does not know tokenizers or models.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rayreward.errors import DataError
from rayreward.parts import is_media, joined
from rayreward.types import Conversation, Failure, Message, Sample, Status, Text

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]

_EXTRAS = ("tools", "chat_template_kwargs")
"""Columns handed to the chat template where a row has them, as TRL does."""

ACCEPTED = (
    "chosen + rejected (+ prompt), prompt + completions, prompt + completion, prompt + response, "
    "messages, or text"
)


class RowKind(enum.StrEnum):
    """How many rewards a row gets, and what they are called."""

    PAIR = "pair"
    COMPLETIONS = "completions"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One way to lay out preference data in columns.

    Attributes:
        kind: How many rewards a row gets.
        columns: The columns that are read, the prompt first where there is one.
        extras: Columns for the chat template, where present.
    """

    kind: RowKind
    columns: tuple[str, ...]
    extras: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that decides a reward."""
        return self.columns + self.extras

    def samples(self, row: Row) -> tuple[Sample, ...] | Failure:
        """What a row asks to score, in the order of its reward columns.

        A failure stands for the whole row, where nobody can say how many rewards it should have.
        """
        prompt = self.prompt(row)
        if self.kind is RowKind.PAIR:
            return tuple(_sample(row, prompt, name) for name in ("chosen", "rejected"))
        if self.kind is RowKind.COMPLETIONS:
            return _completions(row, prompt)
        return (_sample(row, prompt, self.columns[-1]),)

    def prompt(self, row: Row) -> Any:
        """The row's prompt, or a mark that rows of this format have none."""
        return row.get("prompt") if "prompt" in self.columns else _NO_PROMPT


_NO_PROMPT = object()

_FORMATS: tuple[tuple[RowKind, tuple[str, ...]], ...] = (
    (RowKind.PAIR, ("prompt", "chosen", "rejected")),
    (RowKind.PAIR, ("chosen", "rejected")),
    (RowKind.COMPLETIONS, ("prompt", "completions")),
    (RowKind.SINGLE, ("prompt", "completion")),
    (RowKind.SINGLE, ("prompt", "response")),
    (RowKind.SINGLE, ("messages",)),
    (RowKind.SINGLE, ("text",)),
)
"""In the order in which they are tried: the first whose columns are all there."""


def find_format(names: Iterable[str]) -> RowFormat:
    """Finds the row format from the column names.

    Raises:
        DataError: No format fits; the message lists what was found and what is accepted.
    """
    present = list(names)
    for kind, columns in _FORMATS:
        if set(columns) <= set(present):
            return RowFormat(kind, columns, tuple(name for name in _EXTRAS if name in present))
    raise DataError(
        f"No known row format in the columns {', '.join(present) or '(none)'}. Accepted: "
        f"{ACCEPTED}. Rename the columns to one of these."
    )


def read_samples(
    table: pa.Table, row_format: RowFormat, lost: Mapping[int, Failure] = MappingProxyType({})
) -> list[tuple[Sample, ...] | Failure]:
    """What the rows of a table ask to score.

    Args:
        table: The rows.
        row_format: From `check_schema`.
        lost: Rows that are not to be scored, by their number, and why.
    """
    read = (lost.get(*at) for at in enumerate(_read_rows(table.select(list(row_format.read)))))
    return [row if isinstance(row, Failure) else row_format.samples(row) for row in read]


def _read_rows(table: pa.Table) -> Iterator[dict[str, object] | Failure]:
    """The rows as Python values, a failure where one is not UTF-8."""
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError:
        for index in range(table.num_rows):
            try:
                yield table.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Failure(Status.MALFORMED, f"the row is not valid UTF-8: {error}")


def _completions(row: Row, prompt: Any) -> tuple[Sample, ...] | Failure:
    completions = row.get("completions")
    if completions is None:
        return Failure(Status.MALFORMED, "completions is null")
    return tuple(
        _sample({**row, f"completions[{index}]": completion}, prompt, f"completions[{index}]")
        for index, completion in enumerate(completions)
    )


def _sample(row: Row, prompt: Any, name: str) -> Sample:
    """Joins a prompt and the value of column `name` into a sample, or says why that can't be."""
    try:
        return _join(row, prompt, row.get(name), name)
    except _Malformed as error:
        return Failure(Status.MALFORMED, str(error))


class _Malformed(ValueError):
    """A value is not what its column promises."""


def _join(row: Row, prompt: Any, completion: Any, name: str) -> Sample:
    if prompt is _NO_PROMPT:
        return (
            _plain("", completion) if isinstance(completion, str) else _talk(row, completion, name)
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        return _plain(prompt, completion)
    if isinstance(prompt, str):
        turns = _messages(completion, name)
        return _conversation(row, [*_opening(prompt, turns), *turns])
    opening = _messages(prompt, "prompt")
    if isinstance(completion, str):
        return _conversation(row, [*opening, {"role": "assistant", "content": completion}])
    return _conversation(row, [*opening, *_messages(completion, name)])


def _plain(prompt: str, completion: str) -> Sample:
    if not prompt and not completion:
        return Failure(Status.EMPTY, "the text is empty")
    return Text(prompt, completion)


def _talk(row: Row, messages: Any, name: str) -> Sample:
    return _conversation(row, _messages(messages, name))


def _opening(prompt: str, turns: Sequence[Message]) -> list[Message]:
    """The user's turn that a plain prompt stands for, unless the conversation already has it.

    Data in the manner of HuggingFaceH4/ultrafeedback_binarized repeats the prompt as the first
    message of `chosen` and `rejected`.
    """
    first = next((turn for turn in turns if turn["role"] != "system"), None)
    repeated = (
        first is not None and first["role"] == "user" and joined(first.get("content", "")) == prompt
    )
    return [] if repeated or not prompt else [{"role": "user", "content": prompt}]


def _conversation(row: Row, messages: Sequence[Message]) -> Sample:
    if not messages:
        return Failure(Status.EMPTY, "the conversation has no messages")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse_tools(tools) if tools else None
    template_kwargs = _without_nulls(row.get("chat_template_kwargs") or {})
    return Conversation(tuple(messages), _without_nulls(tools) or None, template_kwargs)


def _parse_tools(tools: str) -> Any:
    try:
        return json.loads(tools)
    except ValueError as error:
        raise _Malformed(f"tools is not JSON: {error}") from error


def _messages(value: Any, name: str) -> list[Message]:
    if value is None:
        raise _Malformed(f"{name} is null")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _Malformed(f"{name} is of type {type(value).__name__}, not text or messages")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise _Malformed(f"{where} is of type {type(value).__name__}, not a message")
    message: dict[str, Any] = _without_nulls(value)
    if not isinstance(message.get("role"), str):
        raise _Malformed(f"{where} has no role")
    if "content" not in message and "tool_calls" not in message:
        raise _Malformed(f"{where} has no content")
    content = message.get("content", "")
    if not isinstance(content, str | Sequence) or isinstance(content, bytes):
        raise _Malformed(f"{where} has a content that is neither text nor a list of parts")
    if not isinstance(content, str):
        _check_parts(content, where)
    return message


def _check_parts(parts: Sequence[Any], where: str) -> None:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise _Malformed(
                f"{where}.content[{index}] is of type {type(part).__name__}, not a part"
            )
        if is_media(part):
            raise _Malformed(
                f"{where}.content[{index}] is of type {part['type']!r}, and only text is scored"
            )


def _without_nulls(value: Any) -> Any:
    """Drops null fields: Arrow fills in every field that some other row has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def is_string(kind: Any) -> bool:
    """Whether an Arrow type holds text, dictionary-encoded or not."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def is_list_of(kind: Any, of: Callable[[Any], bool]) -> bool:
    """Whether an Arrow type is a list whose items pass a test."""
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*lists, *views)) and of(kind.value_type)


def _is_message(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    fields = {field.name for field in kind}
    return "role" in fields and not fields.isdisjoint({"content", "tool_calls"})


def _is_text_or_messages(kind: Any) -> bool:
    return is_string(kind) or is_list_of(kind, _is_message)


def check_schema(schema: Any) -> RowFormat:
    """Finds the row format of an Arrow schema and checks the types of its columns.

    Args:
        schema: A `pyarrow.Schema`.

    Raises:
        DataError: No format fits, or a column has a type that holds no text.
    """
    found = find_format(schema.names)
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"Columns {', '.join(twice)} are there more than once. Rename or drop one.")
    for name in found.columns:
        kind = schema.field(name).type
        wanted = "text or a list of messages"
        fits = _is_text_or_messages(kind)
        if name == "completions":
            wanted = f"a list of {wanted}"
            fits = is_list_of(kind, _is_text_or_messages)
        if name in ("messages", "text"):
            wanted = "a list of messages" if name == "messages" else "text"
            fits = is_list_of(kind, _is_message) if name == "messages" else is_string(kind)
        if not fits:
            raise DataError(
                f"Column {name!r} is of type {kind}; it should hold {wanted}. A message is a "
                "struct with role and content. Convert the column, or rename it if it is another."
            )
    return found


def is_conversational(schema: Any, row_format: RowFormat) -> bool:
    """Whether rows of this schema go through a chat template."""
    types = [schema.field(name).type for name in row_format.columns]
    return any(
        is_list_of(kind, _is_message)
        or is_list_of(kind, lambda item: is_list_of(item, _is_message))
        for kind in types
    )
