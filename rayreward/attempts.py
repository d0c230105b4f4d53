"""What an actor writes: a shard's rewards, as a file that is no part of the output yet.

Only the driver makes a part of it (`writing`). Does not know models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward import storage
from rayreward.errors import OutputError
from rayreward.types import Attempt, Tally

_METADATA_KEY = b"rayreward"


@dataclass(frozen=True, slots=True)
class Attempts:
    """What an actor knows of an output: where attempts go, and what tells that they are too late.

    Names are the driver's: what links they pass through is not the same on every machine.
    """

    directory: str
    success: str

    def write(self, shard: int, table: pa.Table, tally: Tally) -> Attempt:
        """Writes a shard's result as an attempt with a name of its own.

        Another actor's attempt may have come first and the run to its end: nothing is left then.

        Raises:
            OutputError: It can't be written.
        """
        path = os.path.join(self.directory, f"{shard:06d}-{uuid.uuid4().hex}.parquet")
        attempt = write_attempt(path, shard, table, tally)
        with contextlib.suppress(OSError):  # what is left there counts for nothing
            place = storage.storage_of(path)
            if place.exists(self.success):
                place.remove(path)
        return attempt


def write_attempt(path: str, shard: int, table: pa.Table, tally: Tally) -> Attempt:
    """Writes a shard's result beside the output and makes sure that it is there for good.

    Raises:
        OutputError: It can't be written; nothing is left of it.
    """
    try:
        with storage.storage_of(path).writing(path) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            size = file.tell()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"Writing {path} failed: {reason}. Free space or choose another output; the same "
            "command resumes this run."
        ) from error
    return Attempt(shard, path, size, digest, tally)


def output_schema(schema: pa.Schema, added: pa.Schema, provenance: Mapping[str, Any]) -> pa.Schema:
    """The schema of every part: the input's columns, the added ones, provenance as metadata.

    The input's own schema metadata is dropped: what pandas or datasets wrote there describes a
    table with other columns.
    """
    nullable = [field.with_nullable(True) for field in schema]
    metadata = {_METADATA_KEY: json.dumps(provenance, sort_keys=True).encode()}
    return pa.schema([*nullable, *added], metadata=metadata)


def read_provenance(path: str) -> dict[str, Any]:
    """Reads the provenance out of a part."""
    schema = pq.read_schema(storage.source(path))
    provenance: dict[str, Any] = json.loads(schema.metadata[_METADATA_KEY])
    return provenance
