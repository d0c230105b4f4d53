"""A dataset becomes a plan: an ordered list of shards, frozen before any work starts.

The plan depends on the files and the settings alone. It holds where rows are, never the rows.
Does not know torch or Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from rayreward import storage
from rayreward.columns import check_free
from rayreward.errors import DataError
from rayreward.finding import find_files
from rayreward.formats import (
    EXTENSIONS,
    Damaged,
    Format,
    Piece,
    Scan,
    format_of,
    settle,
)
from rayreward.preferences import RowFormat, check_schema, is_conversational
from rayreward.schemas import bare, check_names, check_storable, unite

_AUTO_SHARDS = 256
_AUTO_ROWS = (64, 4_096)
"""Automatic shards: a 256th of the rows, so that progress is seen and a lost shard costs little,
but neither so few rows that files abound nor so many that a shard takes long."""

_READERS = 8
"""Files looked through at once when the plan is made: most of that is waiting and decoding."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the dataset, as it was when the plan was made."""

    path: str
    format: str
    size_bytes: int
    mtime_ns: int
    rows: int
    etag: str | None = None
    """An object store's own mark of its content."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive rows of one file, within one row group, record batch or run of lines."""

    file: SourceFile
    piece: Piece

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.piece.rows

    def slice(self, start: int, rows: int) -> Extent:
        """`rows` of its rows, from the one numbered `start` within it."""
        return Extent(self.file, self.piece.slice(start, rows))


@dataclass(frozen=True, slots=True)
class Shard:
    """A unit of work: consecutive rows of the dataset, of one file or of several."""

    index: int
    extents: tuple[Extent, ...]
    """Where the rows are, in the dataset's order; never empty."""

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(extent.rows for extent in self.extents)

    @property
    def source(self) -> str:
        """The file that its rows are from, or the first and the last of them."""
        first, last = self.extents[0].file.path, self.extents[-1].file.path
        return first if first == last else f"{first} to {last}"

    def slice(self, start: int, rows: int) -> Shard:
        """`rows` of its rows, from the one numbered `start` within it, under the same index."""
        chosen = []
        for extent in self.extents:
            first, last = max(start, 0), min(start + rows, extent.rows)
            if first < last:
                chosen.append(extent.slice(first, last - first))
            start -= extent.rows
        return Shard(self.index, tuple(chosen))


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about the input that the work needs to know."""

    files: tuple[SourceFile, ...]
    schema: pa.Schema
    row_format: RowFormat
    rows_per_shard: int
    """Rows in each shard but the last."""
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole dataset."""
        return sum(file.rows for file in self.files)

    @property
    def conversational(self) -> bool:
        """Whether rows go through the model's chat template."""
        return is_conversational(self.schema, self.row_format)


def plan_dataset(dataset: str, rows_per_shard: int | Literal["auto"] = "auto") -> Plan:
    """Finds the files, checks that they fit together, and cuts them into shards.

    Args:
        dataset: A file, a directory, a glob, or what `datasets.save_to_disk` wrote.
        rows_per_shard: Rows in each shard but the last: shards are cut by count alone, through
            files and row groups, so the same rows laid out otherwise make the same shards.

    Raises:
        DataError: Nothing is there, it is empty, it can't be read, or its columns are unknown.
    """
    paths = find_files(dataset)
    found = [(path, _format(path)) for path in paths]
    _check_one_format(found)
    schema: pa.Schema | None = None
    files: list[SourceFile] = []
    extents: list[Extent] = []
    for (path, form), (stat, scan) in zip(found, _scan_all(found), strict=True):
        if scan.rows:
            schema = _merge(schema, bare(scan.schema), files, path, form)
        file = SourceFile(path, form.name, stat.size_bytes, stat.mtime_ns, scan.rows, stat.etag)
        files.append(file)
        extents += [Extent(file, piece) for piece in scan.pieces]
    if schema is None:
        where = paths[0] if len(paths) == 1 else f"any of its {len(paths)} files"
        raise DataError(f"Dataset {dataset!r} is empty: no rows in {where}. Pass files with rows.")
    row_format = check_schema(schema)
    check_free(schema, row_format.kind)
    schema = settle(schema) if files[0].format == "json" else schema
    check_storable(schema)
    total = sum(file.rows for file in files)
    size = _auto_rows(total) if rows_per_shard == "auto" else rows_per_shard
    shards = (Shard(index, shared) for index, shared in enumerate(_deal(extents, size)))
    return Plan(tuple(files), schema, row_format, size, tuple(shards))


def _format(path: str) -> Format:
    form = format_of(path)
    if form is None:
        raise DataError(
            f"{path} does not end as any format does that RayReward reads: "
            f"{', '.join(EXTENSIONS)}. Convert it, or rename it if it is one of them."
        )
    return form


def _check_one_format(files: list[tuple[str, Format]]) -> None:
    first_path, first = files[0]
    for path, form in files:
        if form.name != first.name:
            raise DataError(
                f"The dataset mixes formats: {first_path} is {first.name}, {path} is {form.name}. "
                "If they hold the same rows, pass one of them; else convert them to one format."
            )


def _scan_all(files: list[tuple[str, Format]]) -> Iterator[tuple[storage.Stat, Scan]]:
    """Looks through files, several at once; yields in their order."""
    with ThreadPoolExecutor(_READERS) as readers:
        try:
            yield from readers.map(_scan, files)
        finally:
            readers.shutdown(cancel_futures=True)


def _scan(file: tuple[str, Format]) -> tuple[storage.Stat, Scan]:
    path, form = file
    with _planning(path, form):
        # before the scan, so that a change meanwhile is seen when reading
        stat = storage.storage_of(path).stat(path)
        scan = form.scan(path)
        check_names(path, list(scan.schema))
    return stat, scan


@contextmanager
def _planning(path: str, form: Format) -> Iterator[None]:
    """What can't be read when the plan is made is nothing to score around."""
    try:
        yield
    except (Damaged, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable {form.title} file: {error}. It may be cut off or still "
            "being written: copy it again, or leave it out of the dataset."
        ) from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def _merge(
    schema: pa.Schema | None, found: pa.Schema, before: list[SourceFile], path: str, form: Format
) -> pa.Schema:
    """The schema of the files so far and one more."""
    if schema is None:
        return found
    if form.name == "json":  # a schema found by looking at values: it may lack what others have
        try:
            return pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{path} does not fit the files before it: {error}. Give all files one schema, or "
                "score them apart."
            ) from error
    united, differing = unite(schema, found)
    if differing:
        name = differing[0]
        ours, theirs = (
            {field.name: field.type for field in columns} for columns in (schema, found)
        )
        first = next(file.path for file in before if file.rows)
        raise DataError(
            f"The files have different columns: {name!r} is {ours.get(name, 'absent')} in "
            f"{first} and {theirs.get(name, 'absent')} in {path}"
            + (f" (so differ {', '.join(differing[1:])})" if differing[1:] else "")
            + ". Give all files one schema, or score them apart."
        )
    return united


def _auto_rows(total: int) -> int:
    low, high = _AUTO_ROWS
    return min(max(-(-total // _AUTO_SHARDS), low), high)


def _deal(extents: Iterable[Extent], rows: int) -> Iterator[tuple[Extent, ...]]:
    """Deals rows out in their order, `rows` to a shard; the last one gets what is left."""
    held: list[Extent] = []
    room = rows
    for extent in extents:
        start = 0
        while start < extent.rows:
            taken = extent.slice(start, min(room, extent.rows - start))
            held.append(taken)
            start += taken.rows
            room -= taken.rows
            if room == 0:
                yield tuple(held)
                held, room = [], rows
    if held:
        yield tuple(held)
