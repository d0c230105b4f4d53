"""The output: attempts become parts, then a manifest, then the success marker.

    output/
      part-000000.parquet …       committed parts, one a shard, in the input's order
      _manifest.json              what was done, with a checksum for each part
      _SUCCESS                    written last
      _rayreward/plan.json        what this run is, so that only the same run resumes it
      _rayreward/ledger.jsonl     parts committed so far
      _rayreward/attempts/        files that are no part yet

Actors write attempts (`attempts`); only the driver promotes one to a part. Readers pass over names
that start with an underscore, so a finished directory reads as one Parquet dataset.

In an object store nothing can be moved and nothing grows: there promoting is a copy within the
store, and the ledger is `_rayreward/ledger/`, an object for each part. A part still counts only
once the ledger has it. Does not know models.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayreward import storage
from rayreward.attempts import Attempts
from rayreward.errors import OutputError
from rayreward.types import Attempt, Tally

_OURS = "_rayreward"
_MANIFEST = "_manifest.json"
_SUCCESS = "_SUCCESS"


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part, as the ledger has it."""

    shard: int
    name: str
    size_bytes: int
    sha256: str
    tally: Tally


class OutputDirectory:
    """A run's output. Created by `create` or `resume`; nothing is written before that.

    Attributes:
        path: Where it lies: a path, or in an object store the URL less what may be secret in it.
    """

    def __init__(self, path: str) -> None:
        self.path = storage.locate(path)
        self._parts: dict[int, Part] = {}

    @property
    def attempts(self) -> Path | str:
        """Where actors write."""
        return storage.locate(self.at(_OURS, "attempts"))

    @property
    def for_actors(self) -> Attempts:
        """What actors need to write attempts."""
        return Attempts(str(self.attempts), self.at(_SUCCESS))

    @property
    def parts(self) -> list[Part]:
        """Committed parts, in the input's order."""
        return [self._parts[shard] for shard in sorted(self._parts)]

    @property
    def finished(self) -> bool:
        """Whether an earlier run came to its end here.

        Raises:
            OutputError: It can't be told.
        """
        try:
            return self._storage.exists(self.at(_SUCCESS))
        except OSError as error:
            raise self._unreadable(error) from error

    def at(self, *names: str) -> str:
        """The absolute name of something in here."""
        return os.path.join(self.path, *names)

    def open(self, name: str) -> io.BufferedReader:
        """Opens a part for reading.

        Raises:
            OSError: It can't be opened.
        """
        return self._storage.open(self.at(name))

    def part_names(self) -> list[str]:
        """Names of all that looks like a part, whether it is one or not.

        Raises:
            OutputError: The directory can't be read.
        """
        try:
            names = self._storage.sizes(self.at())
        except OSError as error:
            raise self._unreadable(error) from error
        return sorted(name for name in names if name.startswith("part-"))

    def existing_plan(self) -> dict[str, Any] | None:
        """The plan of the run that this directory belongs to, or null if it has none.

        Raises:
            OutputError: Something else is in the way.
        """
        try:
            if self._storage.exists(self._plan):
                plan = json.loads(self._storage.read(self._plan))
                if isinstance(plan, dict):
                    return plan
                raise ValueError("plan.json is not an object")
            in_the_way = self._storage.occupied(self.at(), apart_from=_OURS)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
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
            manifest = json.loads(self._storage.read(self.at(_MANIFEST)))
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
        try:
            parts = filter(_PART_NAME.fullmatch, self._storage.sizes(self.at()))
            for name in [_SUCCESS, _MANIFEST, *parts]:
                self._storage.remove(self.at(name))
            self._storage.remove_directory(self.at(_OURS))
        except OSError as error:
            raise OutputError(f"Clearing {self.path} failed: {_reason(error)}.") from error

    def create(self, plan: Mapping[str, Any]) -> None:
        """Starts a new run here, over what one left that was cut off before it had a plan.

        Raises:
            OutputError: The directory can't be written to.
        """
        try:
            self._storage.remove_directory(self.at(_OURS))
            self._storage.make_directory(str(self.attempts))
            self._storage.write(self._plan, json.dumps(plan, indent=1))
        except OSError as error:
            raise OutputError(
                f"Output {self.path} can't be written to: {_reason(error)}. Choose "
                "another directory, or mend its permissions."
            ) from error

    def resume(self, shards: int) -> None:
        """Takes up the parts that an earlier run committed; throws its open attempts away.

        Args:
            shards: How many the plan has; with fewer parts, a success marker is not true.

        Raises:
            OutputError: The directory can't be read or written to.
        """
        try:
            there = self._storage.sizes(self.at())
            for part in filter(None, map(_read_part, self._storage.lines(self._ledger))):
                if there.get(part.name) == part.size_bytes:
                    self._parts[part.shard] = part
            if len(self._parts) < shards:
                self._storage.remove(self.at(_SUCCESS))
            self._remove_attempts()
            self._storage.make_directory(str(self.attempts))
            lines = {part.name: json.dumps(asdict(part)) for part in self.parts}
            self._storage.keep_lines(self._ledger, lines)
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
            self.discard(attempt)
            return False
        name = f"part-{attempt.shard:06d}.parquet"
        part = Part(attempt.shard, name, attempt.size_bytes, attempt.sha256, attempt.tally)
        try:
            self._storage.publish(attempt.path, self.at(name))
            self._storage.add_line(self._ledger, name, json.dumps(asdict(part)))
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
            self._storage.remove(attempt.path)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, then the success marker; clears away what became no part.

        In this order no attempt outlives the run: one that comes too late to be cleared away
        finds the marker.

        Raises:
            OutputError: They can't be written.
        """
        try:
            self._storage.write(self.at(_MANIFEST), json.dumps(manifest, indent=1))
            self._storage.write(self.at(_SUCCESS), "")
            self._remove_attempts()
        except OSError as error:
            raise OutputError(
                f"Finishing {self.path} failed: {_reason(error)}. The same command finishes it."
            ) from error

    @property
    def _storage(self) -> storage.Disk | storage.Objects:
        return storage.storage_of(str(self.path))

    @property
    def _plan(self) -> str:
        return self.at(_OURS, "plan.json")

    @property
    def _ledger(self) -> str:
        return self.at(_OURS, "ledger.jsonl")

    def _remove_attempts(self) -> None:
        with contextlib.suppress(OSError):  # what is left there counts for nothing
            self._storage.remove_directory(str(self.attempts))

    def _unreadable(self, error: Exception) -> OutputError:
        return OutputError(
            f"Output {self.path} can't be read: {_reason(error)}. Choose another directory."
        )


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
