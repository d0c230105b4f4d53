"""Write the example preference pairs in every row format that RayReward reads.

Reads `preferences.jsonl`, which lies beside this script, and writes

* `preferences.parquet`: the same rows and columns as the JSON Lines file;
* `formats/<name>.jsonl` and `formats/<name>.parquet`: the same content, once for each format.

Run it as `python examples/make_formats.py`, from any directory. With the same input and the same
version of pyarrow, a second run writes the same bytes.

The script needs pyarrow and nothing else. It does not import RayReward, apply a model's chat
template, shuffle or filter rows, or delete files that an earlier version of it has written.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "preferences.jsonl"
FORMATS_DIR = HERE / "formats"

TEXT = pa.string()
TEXTS = pa.list_(TEXT)
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
SENTENCE_END = re.compile(r"(?<=[.!?।])\s|(?<=。)|\n")
EXTRA_COMPLETION_EVERY = 3

Message = dict[str, str]
Row = dict[str, Any]


def render_turns(messages: list[Message]) -> str:
    r"""Render messages as plain text, one labelled paragraph for each of them.

    Args:
        messages: Messages with the keys `role` and `content`.

    Returns:
        Text such as `Human: Hi\n\nAssistant: Hello\n\n`, or an empty string for no messages.
    """
    return "".join(f"{SPEAKERS[m['role']]}: {m['content']}\n\n" for m in messages)


def render_prompt(messages: list[Message]) -> str:
    """Render a prompt as plain text that ends where the assistant's answer would begin."""
    return render_turns(messages) + "Assistant: "


def content_of(completion: list[Message]) -> str:
    """Return the text of a completion, which must be a single message."""
    (message,) = completion
    return message["content"]


def shorten(text: str) -> str:
    """Return the first sentence or line of a text, or the first half of a text that has only one.

    The cut is a rough one, made for example data: an abbreviation such as `e.g.` ends a sentence.
    """
    start = SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    if start != text.strip():
        return start
    words = start.split()
    return " ".join(words[: (len(words) + 1) // 2])


def pairs_conversational_implicit(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each pair: two whole conversations, and no prompt."""
    for row in rows:
        yield {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "topic": row["topic"],
        }


def pairs_text(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each pair: prompt, chosen and rejected as plain text."""
    for row in rows:
        yield {
            "prompt": render_prompt(row["prompt"]),
            "chosen": content_of(row["chosen"]),
            "rejected": content_of(row["rejected"]),
            "topic": row["topic"],
        }


def pairs_text_implicit(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each pair: two texts that both begin with the prompt."""
    for row in pairs_text(rows):
        yield {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "topic": row["topic"],
        }


def prompt_completion(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each completion, chosen before rejected: messages in both columns."""
    for row in rows:
        for side in ("chosen", "rejected"):
            yield {"prompt": row["prompt"], "completion": row[side], "topic": row["topic"]}


def prompt_response(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each completion, chosen before rejected: text in both columns."""
    for row in prompt_completion(rows):
        yield {
            "prompt": render_prompt(row["prompt"]),
            "response": content_of(row["completion"]),
            "topic": row["topic"],
        }


def prompt_completions(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each prompt: its text and a list of two or three completions.

    The list holds the chosen and the rejected completion. In rows 0, 3, 6 and so on a shortened
    copy of the chosen one follows.
    """
    for index, row in enumerate(pairs_text(rows)):
        completions = [row["chosen"], row["rejected"]]
        if index % EXTRA_COMPLETION_EVERY == 0:
            completions.append(shorten(row["chosen"]))
        yield {"prompt": row["prompt"], "completions": completions, "topic": row["topic"]}


def messages(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each completion, chosen before rejected: a whole conversation."""
    for row in prompt_completion(rows):
        yield {"messages": row["prompt"] + row["completion"], "topic": row["topic"]}


def text(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each completion, chosen before rejected: one plain text."""
    for row in prompt_response(rows):
        yield {"text": row["prompt"] + row["response"], "topic": row["topic"]}


SOURCE_COLUMNS = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "topic": TEXT}

Format = tuple[Callable[[list[Row]], Iterator[Row]], dict[str, Any]]
FORMATS: list[Format] = [
    (pairs_conversational_implicit, {"chosen": MESSAGES, "rejected": MESSAGES, "topic": TEXT}),
    (pairs_text, {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "topic": TEXT}),
    (pairs_text_implicit, {"chosen": TEXT, "rejected": TEXT, "topic": TEXT}),
    (prompt_completion, {"prompt": MESSAGES, "completion": MESSAGES, "topic": TEXT}),
    (prompt_response, {"prompt": TEXT, "response": TEXT, "topic": TEXT}),
    (prompt_completions, {"prompt": TEXT, "completions": TEXTS, "topic": TEXT}),
    (messages, {"messages": MESSAGES, "topic": TEXT}),
    (text, {"text": TEXT, "topic": TEXT}),
]


def read_jsonl(path: Path) -> list[Row]:
    """Read a JSON Lines file that has one object on every line."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(rows: list[Row], path: Path) -> None:
    """Write rows as JSON Lines in UTF-8, leaving characters beyond ASCII as they are."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(rows: list[Row], columns: dict[str, Any], path: Path) -> None:
    """Write rows as a Parquet file compressed with Zstandard.

    Args:
        rows: The rows, each with exactly the keys of `columns`.
        columns: Column names and their Arrow types, in the order of the file.
        path: The file to write.

    Raises:
        ValueError: If the keys of a row differ from the columns.
    """
    names = list(columns)
    for number, row in enumerate(rows):
        if list(row) != names:
            raise ValueError(f"{path.name}: row {number} has the keys {list(row)}, not {names}")
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))
    pq.write_table(table, path, compression="zstd")


def main() -> None:
    """Write `preferences.parquet` and both files of each format, and print their row counts."""
    source = read_jsonl(SOURCE)
    write_parquet(source, SOURCE_COLUMNS, SOURCE.with_suffix(".parquet"))
    print(f"{len(source):4} rows  {SOURCE.stem}")
    FORMATS_DIR.mkdir(exist_ok=True)
    for convert, columns in FORMATS:
        name = convert.__name__
        rows = list(convert(source))
        write_jsonl(rows, FORMATS_DIR / f"{name}.jsonl")
        write_parquet(rows, columns, FORMATS_DIR / f"{name}.parquet")
        print(f"{len(rows):4} rows  formats/{name}")


if __name__ == "__main__":
    main()
