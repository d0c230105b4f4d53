"""The output directory: attempts become parts, then a manifest, then the success marker.

    output/
      part-000000.parquet …       committed parts, one a shard, in the input's order
      _manifest.json              what was done, with a checksum for each part
      _SUCCESS                    written last
      _rayreward/plan.json        what this run is, so that only the same run resumes it
      _rayreward/ledger.jsonl     parts committed so far
      _rayreward/attempts/        files that are no part yet

Actors write attempts; only the driver promotes one to a part. Readers pass over names that start
with an underscore, so a finished directory reads as one Parquet dataset. Does not know models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayreward.errors import OutputError
from rayreward.types import Attempt, Tally

_OURS = "_rayreward"
_MANIFEST = "_manifest.json"
_SUCCESS = "_SUCCESS"
_METADATA_KEY = b"rayreward"


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part, as the ledger has it."""

    shard: int
    name: str
    size_bytes: int
    sha256: str
    tally: Tally


def write_attempt(path: str, shard: int, table: pa.Table, tally: Tally) -> Attempt:
    """Writes a shard's result beside the output and makes sure that it is on the disk.

    Raises:
        OutputError: It can't be written; nothing is left of it.
    """
    try:
        with open(path, "wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        size, digest = os.path.getsize(path), _sha256(path)
    except (OSError, pa.ArrowException) as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise OutputError(
            f"Writing {path} failed: {_reason(error)}. Free space or choose another output; the "
            "same command resumes this run."
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
    provenance: dict[str, Any] = json.loads(pq.read_schema(path).metadata[_METADATA_KEY])
    return provenance


class OutputDirectory:
    """A run's output. Created by `create` or `resume`; nothing is on disk before that."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser().resolve()
        self._ours = self.path / _OURS
        self._parts: dict[int, Part] = {}

    @property
    def attempts(self) -> Path:
        """Where actors write."""
        return self._ours / "attempts"

    @property
    def parts(self) -> list[Part]:
        """Committed parts, in the input's order."""
        return [self._parts[shard] for shard in sorted(self._parts)]

    @property
    def finished(self) -> bool:
        """Whether an earlier run came to its end here."""
        return (self.path / _SUCCESS).exists()

    def existing_plan(self) -> dict[str, Any] | None:
        """The plan of the run that this directory belongs to, or null if it has none.

        Raises:
            OutputError: Something else is in the way.
        """
        try:
            if (self._ours / "plan.json").exists():
                plan = json.loads((self._ours / "plan.json").read_text(encoding="utf-8"))
                if isinstance(plan, dict):
                    return plan
                raise ValueError("plan.json is not an object")
            in_the_way = self.path.is_file() or (self.path.exists() and any(self.path.iterdir()))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"Output {self.path} can't be read: {_reason(error)}. Choose another directory."
            ) from error
        if in_the_way:
            raise OutputError(
                f"Output {self.path} already has other files in it. Choose a new or empty "
                "directory: nothing that RayReward did not write is ever overwritten."
            )
        return None

    def read_manifest(self) -> dict[str, Any]:
        """The manifest of a finished run.

        Raises:
            OutputError: There is none, or the run did not come to its end.
        """
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.path} is no finished output: its {_MANIFEST} can't be read "
                f"({_reason(error)}). Pass the directory that a job wrote to."
            ) from error
        if not self.finished:
            raise OutputError(
                f"The run in {self.path} did not come to its end: there is no {_SUCCESS}. The "
                "same command as before finishes it."
            )
        return dict(manifest)

    def clear(self) -> None:
        """Removes everything that RayReward wrote here, and nothing else; the marker first.

        Raises:
            OutputError: Something can't be removed.
        """
        parts = [path for path in self.path.glob("*") if _PART_NAME.fullmatch(path.name)]
        try:
            for path in [self.path / _SUCCESS, self.path / _MANIFEST, *parts]:
                path.unlink(missing_ok=True)
            if self._ours.exists():
                shutil.rmtree(self._ours)
        except OSError as error:
            raise OutputError(f"Clearing {self.path} failed: {_reason(error)}.") from error

    def create(self, plan: Mapping[str, Any]) -> None:
        """Starts a new run here.

        Raises:
            OutputError: The directory can't be written to.
        """
        try:
            self.attempts.mkdir(parents=True, exist_ok=True)
            _write_durably(self._ours / "plan.json", json.dumps(plan, indent=1))
        except OSError as error:
            raise OutputError(
                f"Output {self.path} can't be written to: {_reason(error)}. Choose "
                "another directory, or mend its permissions."
            ) from error

    def resume(self, shards: int) -> None:
        """Takes up the parts that an earlier run committed; throws its open attempts away.

        The ledger is written anew, since a run that was killed may have left half a line.

        Args:
            shards: How many the plan has; with fewer parts, a success marker is not true.

        Raises:
            OutputError: The directory can't be read or written to.
        """
        ledger = self._ours / "ledger.jsonl"
        try:
            lines = ledger.read_bytes().splitlines() if ledger.exists() else []
            for part in filter(None, map(_read_part, lines)):
                file = self.path / part.name
                if file.exists() and file.stat().st_size == part.size_bytes:
                    self._parts[part.shard] = part
            if len(self._parts) < shards:
                (self.path / _SUCCESS).unlink(missing_ok=True)
            shutil.rmtree(self.attempts, ignore_errors=True)
            self.attempts.mkdir(parents=True)
            _write_durably(ledger, "".join(json.dumps(asdict(part)) + "\n" for part in self.parts))
        except OSError as error:
            raise OutputError(
                f"Output {self.path} can't be taken up: {_reason(error)}. Mend that, or choose "
                "another directory."
            ) from error

    def promote(self, attempt: Attempt) -> bool:
        """Makes an attempt the part of its shard. The first one wins.

        Returns:
            Whether it became the part.

        Raises:
            OutputError: It can't be moved or noted.
        """
        if attempt.shard in self._parts:
            Path(attempt.path).unlink(missing_ok=True)
            return False
        name = f"part-{attempt.shard:06d}.parquet"
        part = Part(attempt.shard, name, attempt.size_bytes, attempt.sha256, attempt.tally)
        try:
            os.replace(attempt.path, self.path / name)
            _append_durably(self._ours / "ledger.jsonl", json.dumps(asdict(part)))
        except OSError as error:
            raise OutputError(
                f"Committing {name} in {self.path} failed: {_reason(error)}. The same "
                "command resumes this run."
            ) from error
        self._parts[part.shard] = part
        return True

    def discard(self, attempt: Attempt) -> None:
        """Removes an attempt that may not become a part."""
        with contextlib.suppress(OSError):  # what is left goes with the directory at the end
            os.unlink(attempt.path)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, then the success marker.

        Raises:
            OutputError: They can't be written.
        """
        try:
            _write_durably(self.path / _MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(self.attempts, ignore_errors=True)
            _write_durably(self.path / _SUCCESS, "")
        except OSError as error:
            raise OutputError(
                f"Finishing {self.path} failed: {_reason(error)}. The same command finishes it."
            ) from error


_PART_NAME = re.compile(r"part-\d{6,}\.parquet")


def _read_part(line: bytes) -> Part | None:
    """A line of the ledger, or null if a run was cut off while it wrote it."""
    try:
        record = json.loads(line)
        return Part(**{**record, "tally": Tally(**record["tally"])})
    except (KeyError, TypeError, ValueError):
        return None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _append_durably(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
