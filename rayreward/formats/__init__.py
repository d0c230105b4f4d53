"""The file formats that datasets come in, one module each, behind one protocol."""

from rayreward.formats.base import Damaged, Format, Piece, Scan
from rayreward.formats.json_lines import settle
from rayreward.formats.registry import EXTENSIONS, format_named, format_of

__all__ = [
    "EXTENSIONS",
    "Damaged",
    "Format",
    "Piece",
    "Scan",
    "format_named",
    "format_of",
    "settle",
]
