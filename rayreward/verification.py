"""Checks a finished output afterwards: its files, its rows, its model, and its rewards.

Loads the model on this machine, without Ray, and goes by what the output says of itself. Does not
know how a job is run.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rayreward import storage
from rayreward.attempts import read_provenance
from rayreward.columns import reward_schema
from rayreward.config import ModelConfig
from rayreward.determinism import compare
from rayreward.errors import OutputError
from rayreward.fingerprint import Fingerprint
from rayreward.preferences import RowFormat, RowKind, check_schema
from rayreward.scorer import Scorer
from rayreward.types import Status
from rayreward.writing import OutputDirectory


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: What was checked.
        ok: Whether it is as the output says.
        detail: What was found, with the first thing that is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of checking an output. Prints as a list."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all of it is as the output says."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        lines = [
            f"{finding.name:<9} {'ok  ' if finding.ok else 'WRONG'} {finding.detail}"
            for finding in self.findings
        ]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


def verify_output(
    output: str,
    *,
    model: str | None = None,
    sample: int = 256,
    load: Callable[[ModelConfig], Scorer] = Scorer.load,
) -> Verification:
    """Checks a finished output against its own manifest and against the model.

    Files against their checksums; the planned rows against those that are there; the fingerprint
    against that of the checkpoint as loaded now; the rewards of a sample of rows against those that
    it gives now, bit for bit. Where G3 did not hold, a reward depends on what shared its batch, and
    whole parts are scored again instead of single rows.

    Args:
        output: The output directory, or its URL.
        model: Where the checkpoint is now. None: where it was.
        sample: Rows to score again, at least; they are drawn the same way each time.
        load: Loads the model, for tests.

    Raises:
        OutputError: This is no finished output.
        ModelError: The checkpoint can't be loaded.
        ConfigError: The output was made with settings that do not fit the checkpoint.
    """
    directory = OutputDirectory(output)
    manifest, plan = directory.read_manifest(), directory.existing_plan() or {}
    try:
        return _verify(directory, manifest, plan, model, sample, load)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"A part of {directory.path} can't be read: {reason}.") from error


def _verify(
    directory: OutputDirectory,
    manifest: Mapping[str, Any],
    plan: Mapping[str, Any],
    model: str | None,
    sample: int,
    load: Callable[[ModelConfig], Scorer],
) -> Verification:
    files = _check_files(directory, manifest)
    rows = _check_rows(directory, manifest, plan)
    if not (files.ok and rows.ok):
        return Verification((files, rows))
    then, config = _read_provenance(manifest["provenance"])
    config = config if model is None else replace(config, model=model)
    with _computing_with(manifest.get("threads")):
        scorer = load(config)
        return Verification(
            (
                files,
                rows,
                _check_model(then, scorer.fingerprint()),
                _check_rewards(directory, manifest, scorer, then, sample),
            )
        )


@contextmanager
def _computing_with(threads: int | None) -> Iterator[None]:
    """Computes with as many threads as the actors did: bits of padded batches depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_files(output: OutputDirectory, manifest: Mapping[str, Any]) -> Finding:
    listed = {part["name"]: part for part in manifest["parts"]}
    there = set(output.part_names())
    for name, part in sorted(listed.items()):
        if name not in there:
            return Finding("files", False, f"{name} is missing")
        with output.open(name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                return Finding("files", False, f"{name} is not what its checksum says")
        if read_provenance(output.at(name)) != manifest["provenance"]:
            return Finding("files", False, f"{name} has another provenance than the manifest")
    if there - listed.keys():
        return Finding("files", False, f"{min(there - listed.keys())} is not in the manifest")
    return Finding("files", True, f"{len(listed):,} parts are what their checksums say")


def _check_rows(
    output: OutputDirectory, manifest: Mapping[str, Any], plan: Mapping[str, Any]
) -> Finding:
    """Compares the shards of the plan with the parts, row by row count."""
    present = set(output.part_names())
    total, size = plan.get("rows", 0), plan.get("rows_per_shard", 1)
    planned = {
        f"part-{index:06d}.parquet": min(size, total - start)
        for index, start in enumerate(range(0, total, size))
    }
    there = {
        part["name"]: pq.read_metadata(storage.source(output.at(part["name"]))).num_rows
        for part in manifest["parts"]
        if part["name"] in present
    }
    repeated = [name for name, n in Counter(p["name"] for p in manifest["parts"]).items() if n > 1]
    if repeated:
        return Finding("rows", False, f"{repeated[0]} is in the manifest more than once")
    for name in sorted(planned.keys() | there.keys()):
        if planned.get(name) != there.get(name):
            detail = f"{name} has {there.get(name, 'no')} rows, planned were {planned.get(name, 0)}"
            return Finding("rows", False, detail)
    return Finding(
        "rows", True, f"each of the {sum(planned.values()):,} planned rows is there once"
    )


def _read_provenance(provenance: Mapping[str, Any]) -> tuple[Fingerprint, ModelConfig]:
    try:
        return (
            Fingerprint.from_dict(provenance["fingerprint"]),
            ModelConfig(**provenance["settings"]),
        )
    except TypeError as error:  # a field too many, or one too few
        raise OutputError(
            f"The output was made by RayReward {provenance.get('rayreward')}, which tells other "
            f"things of a model than this version ({error}). Verify it with that version."
        ) from error


def _check_model(then: Fingerprint, now: Fingerprint) -> Finding:
    report = compare({0: now}, then)
    if report.identical:
        origin = (
            "an untrained head, drawn from a seed" if now.head_origin == "seeded" else "trained"
        )
        detail = f"the checkpoint holds the same bits ({origin}) and computes the same probe"
        for difference in report.differences:
            detail += f"; this machine has another {', '.join(difference.environment)}"
        return Finding("model", True, detail)
    [difference] = report.differences
    parts = ", ".join({**difference.model, **difference.computed})
    machine = ", ".join(f"{k} {a}, then {b}" for k, (a, b) in difference.environment.items())
    if difference.model:
        detail = f"the checkpoint is not the one that scored this: another {parts}"
    else:
        detail = f"same weights, but this hardware computes other bits: another {parts}"
    return Finding("model", False, detail + (f" (here: {machine})" if machine else ""))


def _check_rewards(
    output: OutputDirectory,
    manifest: Mapping[str, Any],
    scorer: Scorer,
    then: Fingerprint,
    sample: int,
) -> Finding:
    alone = then.batch_invariant == "holds"
    checked = 0
    for part, before, chosen in _sampled(manifest["parts"], sample, whole_parts=not alone):
        with output.open(part["name"]) as file:
            table = pq.read_table(file)
        given, added, row_format = split_columns(table)
        readable = [
            row for row in chosen if added["reward_status"][row].as_py() != Status.UNREADABLE
        ]
        now = scorer.score_table(given.take(readable), row_format)
        differing = _first_difference(added.take(readable), now)
        if differing is not None:
            at, told = differing
            where = f"row {before + readable[at]:,} ({part['name']}, row {readable[at]:,})"
            return Finding("rewards", False, f"{where} differs: {told}")
        checked += len(readable)
    unit = "rows" if alone else "rows, in whole parts,"
    detail = f"{checked:,} {unit} scored again have the same bits"
    return Finding("rewards", True, f"{detail} (of {manifest['rows']:,})")


def _sampled(
    parts: Sequence[Mapping[str, Any]], sample: int, *, whole_parts: bool
) -> Iterator[tuple[Mapping[str, Any], int, Sequence[int]]]:
    """Yields parts with the number of rows before each and the rows to look at in it."""
    *starts, total = accumulate((part["rows"] for part in parts), initial=0)
    dice = random.Random(0)
    if whole_parts:
        for index in dice.sample(range(len(parts)), len(parts)):
            if sample <= 0:
                return
            sample -= parts[index]["rows"]
            yield parts[index], starts[index], range(parts[index]["rows"])
        return
    rows = sorted(dice.sample(range(total), min(sample, total)))
    for index, chosen in groupby(rows, lambda row: bisect(starts, row) - 1):
        yield parts[index], starts[index], [row - starts[index] for row in chosen]


def split_columns(table: pa.Table) -> tuple[pa.Table, pa.Table, RowFormat]:
    """Takes a part apart: the input's columns, the added ones, the row format.

    Raises:
        OutputError: The added columns are not there.
    """
    for kind in RowKind:
        names = reward_schema(kind).names
        if table.column_names[-len(names) :] == names:
            given = table.select(table.column_names[: -len(names)])
            row_format = check_schema(given.schema)
            if row_format.kind is kind:
                return given, table.select(names), row_format
    raise OutputError("The part does not end in the columns that scoring adds.")


def _first_difference(then: pa.Table, now: pa.Table) -> tuple[int, str] | None:
    """The first row that differs in any column, and how; bit for bit."""
    names = now.column_names
    before, after = then.to_pylist(), now.to_pylist()
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        for name in names:
            if repr(old[name]) != repr(new[name]):  # tells 0.0 from -0.0
                return at, f"{name} is {old[name]!r} in the output and {new[name]!r} now"
    return None
