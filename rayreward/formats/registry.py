"""Which format a file is in, told from its name."""

from __future__ import annotations

from rayreward.formats.arrow_ipc import ArrowIpc
from rayreward.formats.base import Format
from rayreward.formats.json_lines import Json
from rayreward.formats.parquet import Parquet

_PARQUET, _ARROW, _JSON = Parquet(), ArrowIpc(), Json()

EXTENSIONS: dict[str, Format] = {
    ".parquet": _PARQUET,
    ".pq": _PARQUET,
    ".arrow": _ARROW,
    ".arrows": _ARROW,
    ".ipc": _ARROW,
    ".feather": _ARROW,
    **{
        f".{name}{packed}": _JSON
        for name in ("jsonl", "json", "ndjson")
        for packed in ("", ".gz", ".zst")
    },
}
"""File extension to format."""

_BY_NAME: dict[str, Format] = {item.name: item for item in (_PARQUET, _ARROW, _JSON)}


def format_of(path: str) -> Format | None:
    """The format of a file, or null if its extension is none that is read."""
    return next((form for end, form in EXTENSIONS.items() if path.lower().endswith(end)), None)


def format_named(name: str) -> Format:
    """The format with this name."""
    return _BY_NAME[name]
