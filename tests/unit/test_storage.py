"""storage: names show no secrets; what failed in passing is tried again; the rest is told."""

from __future__ import annotations

import io
import json
import random
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from remote import BUCKET, KEY, S3, SECRET, Request, Server, web

from rayreward import storage
from rayreward.attempts import write_attempt
from rayreward.errors import DataError, OutputError
from rayreward.finding import find_files
from rayreward.reading import read_shard
from rayreward.shards import plan_dataset
from rayreward.storage.retry import Retry
from rayreward.types import Attempt, Tally
from rayreward.writing import OutputDirectory

TABLE = pa.table({"text": [f"row {n} " * (n % 7) for n in range(30)], "id": list(range(30))})
TALLY = Tally(rows=3, rewards=3, tokens=7)


def _parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=8, **options)
    return buffer.getvalue()


def _arrow(*, stream: bool) -> bytes:
    buffer = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(buffer, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=8)
    return buffer.getvalue()


def _lines(codec: str | None = None) -> bytes:
    text = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()).encode()
    if codec is None:
        return text
    buffer = io.BytesIO()
    with pa.CompressedOutputStream(pa.PythonFile(buffer, "w"), codec) as stream:
        stream.write(text)
        stream.flush()
        stream.close()
        return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "x.parquet": _parquet,
    "x.arrow": lambda: _arrow(stream=False),
    "x.arrows": lambda: _arrow(stream=True),
    "x.json": lambda: json.dumps(TABLE.to_pylist(), indent=1).encode(),
    "x.jsonl": _lines,
    "x.jsonl.gz": lambda: _gzip(_lines()),
    "x.jsonl.zst": lambda: pa.compress(_lines(), codec="zstd", asbytes=True),
}


def _gzip(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content)


def _rows(dataset: str, size: int = 5) -> list[dict[str, Any]]:
    plan = plan_dataset(dataset, size)
    tables = [read_shard(shard, plan.schema)[0] for shard in plan.shards]
    return [row for table in tables for row in table.to_pylist()]


def _is_get(part: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "GET" and part in request.path


@pytest.fixture
def prefix() -> str:
    """A prefix of the bucket that no other test uses."""
    return uuid.uuid4().hex


# Names


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/b.parquet", "s3://bucket/a/b.parquet"),
        ("S3://bucket/a/", "s3://bucket/a"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("s3://AKIA:top/secret+1@bucket/a", "s3://bucket/a"),
        ("s3://bucket/a?endpoint_override=http://h:1&secret_key=SECRET", "s3://bucket/a"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("s3://bucket/part-?.parquet?region=x", "s3://bucket/part-?.parquet"),
        ("s3://bucket/a:b@c.parquet", "s3://bucket/a:b@c.parquet"),
        ("gs://anonymous@bucket/a", "gs://bucket/a"),
        ("https://u:p@h.org:8/a.parquet?X-Amz-Signature=SECRET#x", "https://h.org:8/a.parquet"),
        ("http://h.org:8/a@b.parquet", "http://h.org:8/a@b.parquet"),
        ("hf://datasets/u/r@main/a.parquet", "hf://datasets/u/r@main/a.parquet"),
        ("/a/b?c=d", "/a/b?c=d"),
        ("file:///a/b%20c", "/a/b c"),
    ],
)
def test_plain_leaves_only_what_a_place_is(url: str, name: str) -> None:
    assert storage.plain(url) == storage.plain(storage.plain(url)) == name


def test_lies_in_goes_by_whole_parts_of_a_name() -> None:
    assert storage.lies_in("s3://b/in/x", "s3://b/in")
    assert storage.lies_in("s3://b/in", "s3://b/in")
    assert not storage.lies_in("s3://b/in2/x", "s3://b/in")


@pytest.mark.usefixtures("s3")
def test_access_goes_with_the_nearest_directory_it_was_given_for() -> None:
    storage.plain("s3://b/in?region=one")
    storage.plain("s3://b/in/deep/*.parquet?region=two")
    storage.plain("s3://user@b/out")
    from rayreward.storage.urls import access_to

    assert access_to("s3://b/in/a.parquet") == ("", "region=one")
    assert access_to("s3://b/in/deep/a.parquet") == ("", "region=two")
    assert access_to("s3://b/out/_rayreward/attempts/x") == ("user", "")
    assert access_to("s3://b/in2/a.parquet") == ("", "")
    sent = storage.access("s3://b/in/*.parquet", "/some/path")
    assert sent == {"s3://b/in": ("", "region=one")}  # and nothing that others need


# Trying again


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def retry(self, draw: float = 1.0, **options: Any) -> Retry:
        return Retry(sleep=self.slept.append, draw=lambda: draw, **options)


def _failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_retry_waits_twice_as_long_each_time_up_to_a_limit() -> None:
    clock = Clock()
    work = _failing(*[ConnectionResetError()] * 5)
    assert clock.retry(longest_s=3.0)(work) == "done"
    assert clock.slept == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_retry_waits_a_random_part_of_that() -> None:
    clock = Clock()
    clock.retry(draw=0.5)(_failing(TimeoutError(), TimeoutError()))
    assert clock.slept == [0.25, 0.5]


def test_retry_gives_up_in_the_end() -> None:
    clock = Clock()
    with pytest.raises(ConnectionResetError):
        clock.retry(attempts=3)(_failing(*[ConnectionResetError()] * 3))
    assert len(clock.slept) == 2


class Refused(Exception):
    """As an HTTP client's error."""

    def __init__(self, status: int) -> None:
        self.status = status


@pytest.mark.parametrize("error", [ValueError(), FileNotFoundError(), Refused(403), Refused(404)])
def test_retry_leaves_alone_what_will_not_change(error: Exception) -> None:
    clock = Clock()
    with pytest.raises(type(error)):
        clock.retry()(_failing(error))
    assert clock.slept == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retry_takes_a_busy_server_for_passing(status: int) -> None:
    assert Clock().retry()(_failing(Refused(status))) == "done"


# Reading


@pytest.mark.parametrize("name", FILES)
def test_s3_rows_of_every_format_are_those_that_were_written(
    s3: S3, prefix: str, name: str
) -> None:
    s3.put(f"{prefix}/{name}", FILES[name]())
    assert _rows(s3.url(f"{prefix}/{name}")) == TABLE.to_pylist()


def test_s3_files_are_found_as_on_a_disk(s3: S3, prefix: str) -> None:
    for key in (
        "b.parquet",
        "a.parquet",
        "deep/er/c.parquet",
        "_x.parquet",
        ".y/a.parquet",
        "R.md",
    ):
        s3.put(f"{prefix}/{key}", b"")
    s3.put(f"{prefix}2/z.parquet", b"")

    def names(dataset: str) -> list[str]:
        return [name.removeprefix(s3.name(prefix) + "/") for name in find_files(s3.url(dataset))]

    assert names(prefix) == names(prefix + "/") == ["a.parquet", "b.parquet", "deep/er/c.parquet"]
    assert names(f"{prefix}/a.parquet") == ["a.parquet"]
    assert (
        names(f"{prefix}/[ab].parquet")
        == names(f"{prefix}/?.parquet")
        == ["a.parquet", "b.parquet"]
    )
    assert names(f"{prefix}/*/*/*.parquet") == ["deep/er/c.parquet"]
    assert names(f"{prefix}/**/*.parquet") == [
        "_x.parquet",
        "a.parquet",
        "b.parquet",
        "deep/er/c.parquet",
    ]


def test_s3_brackets_and_spaces_in_a_key_are_no_pattern(s3: S3, prefix: str) -> None:
    for key in ("a[1].parquet", "b c%20d.parquet"):
        s3.put(f"{prefix}/{key}", _parquet())
        assert find_files(s3.url(f"{prefix}/{key}")) == [s3.name(f"{prefix}/{key}")]
    assert len(_rows(s3.url(prefix))) == 60


def test_s3_dataset_saved_to_disk_in_its_own_order(s3: S3, prefix: str) -> None:
    names = ["data-1.arrow", "data-0.arrow"]
    for name in (*names, "cache-1.arrow"):
        s3.put(f"{prefix}/{name}", _arrow(stream=True))
    state = {"_data_files": [{"filename": name} for name in names]}
    s3.put(f"{prefix}/state.json", json.dumps(state).encode())
    s3.put(f"{prefix}/dataset_info.json", b"{}")
    assert find_files(s3.url(prefix)) == [s3.name(f"{prefix}/{name}") for name in names]
    s3.put(f"{prefix}/state.json", b"{}")
    with pytest.raises(DataError, match="is not what Hugging Face's save_to_disk writes"):
        find_files(s3.url(prefix))
    s3.put(f"{prefix}2/dataset_dict.json", b"{}")
    s3.put(f"{prefix}2/train/data-0.arrow", b"")
    with pytest.raises(DataError, match="holds several splits"):
        find_files(s3.url(f"{prefix}2"))


def test_s3_only_what_is_needed_of_a_file_is_fetched(s3: S3, prefix: str) -> None:
    draw = random.Random(1)
    texts = [draw.randbytes(50_000).hex() for _ in range(32)]
    s3.put(f"{prefix}/x.parquet", content := _parquet(pa.table({"text": texts})))
    plan = plan_dataset(s3.url(prefix), 8)
    s3.server.requests.clear()
    assert read_shard(plan.shards[2], plan.schema)[0]["text"].to_pylist() == texts[16:24]
    ranges = [request.range for request in s3.server.requests if request.method == "GET"]
    bounds = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges if text]
    assert len(bounds) == len(ranges)
    assert len(content) / 4 < sum(end - start for start, end in bounds) < len(content) / 3


def test_s3_object_written_anew_is_no_longer_the_one_that_was_planned(s3: S3, prefix: str) -> None:
    s3.put(f"{prefix}/x.jsonl", b'{"text": "a"}\n')
    plan = plan_dataset(s3.url(prefix))
    s3.put(f"{prefix}/x.jsonl", b'{"text": "b"}\n')  # as long, and within the same second
    with pytest.raises(DataError, match=r"x\.jsonl has changed since the job was planned"):
        read_shard(plan.shards[0], plan.schema)
    s3.files.delete_file(f"{BUCKET}/{prefix}/x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl can't be read on this machine \(there is no"):
        read_shard(plan.shards[0], plan.schema)


@pytest.mark.parametrize("kind", ["slow_down", "drop", "cut"])
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.json", "x.jsonl", "x.jsonl.gz"])
def test_s3_rows_survive_a_store_that_fails_in_passing(
    s3: S3, prefix: str, name: str, kind: str
) -> None:
    s3.put(f"{prefix}/{name}", FILES[name]())
    plan = plan_dataset(s3.url(f"{prefix}/{name}"), 100)
    s3.server.fail(kind, _is_get(name))
    rows = [row for shard in plan.shards for row in read_shard(shard, plan.schema)[0].to_pylist()]
    assert rows == TABLE.to_pylist()
    assert s3.server.faults == []


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("slow_down", "the store asked to slow down"),
        ("drop", "its endpoint can't be reached"),
        ("denied", r"access is denied .* Credentials come from the environment"),
    ],
)
def test_s3_store_that_goes_on_failing_is_told_from_a_damaged_file(
    s3: S3, prefix: str, name: str, kind: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3.put(f"{prefix}/{name}", FILES[name]())
    plan = plan_dataset(s3.url(f"{prefix}/{name}"))
    s3.server.fail(kind, _is_get(name), times=20)
    with pytest.raises(DataError, match=rf"{name} can't be read: {told}"):
        read_shard(plan.shards[0], plan.schema)


# HTTP, and what fsspec has


@pytest.fixture
def site() -> Iterator[tuple[Server, dict[str, bytes]]]:
    """A web server, and the files that it has."""
    files: dict[str, bytes] = {}
    with web(files) as server:
        yield server, files


@pytest.mark.parametrize("name", FILES)
def test_http_rows_of_every_format(site: tuple[Server, dict[str, bytes]], name: str) -> None:
    server, files = site
    files[f"/d/{name}"] = FILES[name]()
    assert _rows(f"http://{server.address}/d/{name}?token=SECRET") == TABLE.to_pylist()
    assert all(request.path.endswith("?token=SECRET") for request in server.requests)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl"])
def test_http_server_without_ranges_is_read_all_the_same(name: str) -> None:
    with web({f"/{name}": FILES[name]()}, ranges=False) as server:
        assert _rows(f"http://{server.address}/{name}") == TABLE.to_pylist()


@pytest.mark.parametrize("kind", ["slow_down", "drop", "cut"])
def test_http_server_that_fails_in_passing(
    site: tuple[Server, dict[str, bytes]], kind: str
) -> None:
    server, files = site
    files["/x.parquet"] = _parquet()
    server.fail(kind, _is_get("x.parquet"))
    assert _rows(f"http://{server.address}/x.parquet", 100) == TABLE.to_pylist()
    assert server.faults == []


def test_http_file_that_has_changed(site: tuple[Server, dict[str, bytes]]) -> None:
    server, files = site
    files["/x.jsonl"] = b'{"text": "a"}\n'
    plan = plan_dataset(f"http://{server.address}/x.jsonl")
    files["/x.jsonl"] = b'{"text": "b"}\n'
    with pytest.raises(DataError, match=r"x\.jsonl has changed since the job was planned"):
        read_shard(plan.shards[0], plan.schema)


@pytest.fixture
def memory(prefix: str) -> Iterator[str]:
    """A place in fsspec's memory."""
    import fsspec

    yield f"memory://{prefix}"
    fsspec.filesystem("memory").store.clear()


def test_fsspec_files_are_found_and_read(memory: str) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe({f"{memory}/a.parquet": _parquet(), f"{memory}/b/c.parquet": _parquet()})
    files.pipe(f"{memory}/_d.parquet", b"")
    assert find_files(memory) == [f"{memory}/a.parquet", f"{memory}/b/c.parquet"]
    assert find_files(f"{memory}/*.parquet") == [f"{memory}/_d.parquet", f"{memory}/a.parquet"]
    assert _rows(f"{memory}/b") == TABLE.to_pylist()


# What goes wrong for good


def _message(dataset: str) -> str:
    with pytest.raises(DataError) as caught:
        plan_dataset(dataset)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_s3_mistakes_are_told(s3: S3, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "no data files are there, and none matches" in _message(s3.url(f"{prefix}/none"))
    assert "no data files are there, and none matches" in _message(s3.url(f"{prefix}/*.parquet"))
    nowhere = s3.url(prefix).replace(f"@{BUCKET}/", "@nowhere/")
    assert "there is no bucket 'nowhere' at this endpoint" in _message(nowhere)
    s3.server.fail("denied", lambda _: True)
    assert "access is denied" in _message(s3.url(f"{prefix}/a.parquet"))
    closed = f"s3://{KEY}:{SECRET}@{BUCKET}/x?endpoint_override=http://127.0.0.1:1"
    assert "its endpoint can't be reached" in _message(closed)
    unknown = f"s3://{BUCKET}/x?secret=SECRET"
    assert "the URL sets secret, which is not known" in _message(unknown)


def test_http_mistakes_are_told(site: tuple[Server, dict[str, bytes]]) -> None:
    server, _ = site
    url = f"http://me:SECRET@{server.address}/x.parquet?sig=SECRET"
    assert "no data files are there" in _message(url)
    server.fail("denied", lambda _: True, times=9)
    assert "access is denied (403" in _message(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nosuch://u:SECRET@a/b.parquet", "nosuch:// is no scheme that is known"),
        ("sftp://u:SECRET@a/b.parquet", "sftp:// needs a package that is not installed"),
        ("hf://datasets/a/b", "its endpoint can't be reached .*offline mode"),
        (
            "gs://anonymous@b/x?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1",
            "its endpoint can't be reached .*UNAVAILABLE",
        ),
        ("gs://bucket/x?key=SECRET", "the URL sets key, which is not known"),
    ],
)
def test_schemes_that_can_not_be_read_are_told(url: str, told: str) -> None:
    import re

    assert re.search(told, _message(url))


# Writing


@pytest.fixture(params=["s3", "memory"])
def output(request: pytest.FixtureRequest, prefix: str) -> str:
    """The URL of an output in an object store."""
    if request.param == "s3":
        url: str = request.getfixturevalue("s3").url(prefix)
        return url
    return str(request.getfixturevalue("memory")) + "/out"


def _attempt(output: OutputDirectory, shard: int, name: str | None = None) -> Attempt:
    path = f"{output.attempts}/{name or shard}.parquet"
    return write_attempt(path, shard, TABLE.slice(3 * shard, 3), TALLY)


def _started(url: str) -> OutputDirectory:
    output = OutputDirectory(url)
    output.create({"run": 1})
    return output


def _late(output: OutputDirectory) -> Attempt:
    return output.for_actors.write(0, TABLE.slice(0, 3), TALLY)


def _attempts(output: OutputDirectory) -> list[str]:
    return list(output._storage.sizes(str(output.attempts)))


def _keys(output: OutputDirectory) -> list[str]:
    return storage.objects_of(str(output.path)).files_below(str(output.path))


def test_output_goes_from_attempts_to_parts_to_success(output: str, tmp_path: Path) -> None:
    there, here = OutputDirectory(output), OutputDirectory(str(tmp_path / "out"))
    assert there.existing_plan() is None
    assert not there.finished
    for place in (there, here):
        place.create({"run": 1})
        for shard in (1, 0):
            assert place.promote(_attempt(place, shard))
        place.finish({"rows": 6})
        assert place.finished
        assert (place.read_manifest(), place.existing_plan()) == ({"rows": 6}, {"run": 1})
        assert place.part_names() == ["part-000000.parquet", "part-000001.parquet"]
    assert there.parts == here.parts
    for name in there.part_names():
        with there.open(name) as one, here.open(name) as other:
            assert one.read() == other.read()
    assert _keys(there) == [
        "_SUCCESS",
        "_manifest.json",
        "_rayreward/ledger/part-000000.parquet.json",
        "_rayreward/ledger/part-000001.parquet.json",
        "_rayreward/plan.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]


def test_output_in_s3_reads_as_one_dataset(s3: S3, prefix: str) -> None:
    output = _started(s3.url(prefix))
    for shard in (2, 0, 1):
        output.promote(_attempt(output, shard))
    output.finish({})
    _attempt(output, 1, "late")  # of an actor that nobody waits for any more
    dataset = ds.dataset(f"{BUCKET}/{prefix}", filesystem=s3.files, format="parquet")
    assert dataset.to_table().equals(TABLE.slice(0, 9))


def test_output_that_is_finished_keeps_no_attempt_that_comes_late(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an actor that was slow: another has done its shard, and the run ends meanwhile."""
    there = _started(output)
    assert there.promote(_late(there))
    in_time, clear_away = _late(there), there._remove_attempts
    assert in_time.path.rpartition("/")[2] in _attempts(there)
    monkeypatch.setattr(there, "_remove_attempts", lambda: (clear_away(), _late(there)))
    there.finish({})
    assert _attempts(there) == []
    _late(there)
    assert _attempts(there) == []


def test_output_takes_the_first_attempt_of_a_shard(output: str) -> None:
    there = _started(output)
    first, late = _attempt(there, 0, "first"), _attempt(there, 0, "late")
    assert there.promote(first)
    assert not there.promote(late)
    assert "_rayreward/attempts/late.parquet" not in _keys(there)
    assert not there.promote(late)  # and once more, when it is already gone
    assert [part.sha256 for part in there.parts] == [first.sha256]


def test_output_resumes_what_its_ledger_has(output: str) -> None:
    there = _started(output)
    for shard in (3, 2, 1, 0):
        there.promote(_attempt(there, shard))
    place = storage.objects_of(str(there.path))
    place.write(there.at("part-000001.parquet"), "another")
    place.remove(there.at("part-000002.parquet"))
    place.remove(there.at("_rayreward", "ledger", "part-000003.parquet.json"))
    place.write(there.at("_SUCCESS"), "")
    _attempt(there, 7)
    again = OutputDirectory(output)
    again.resume(4)
    assert [part.shard for part in again.parts] == [0]
    assert again.parts[0].tally == TALLY
    assert not again.finished
    assert not [key for key in _keys(again) if "attempts" in key or "part-000001.parquet." in key]
    for shard in (1, 2, 3):
        assert again.promote(_attempt(again, shard))
    last = OutputDirectory(output)
    last.resume(4)
    assert last.parts == there.parts


def test_output_clear_removes_only_what_is_ours(output: str) -> None:
    there = _started(output)
    there.promote(_attempt(there, 0))
    there.finish({})
    place = storage.objects_of(str(there.path))
    mine = ["_other/x", "notes.txt", "sub/part-000000.parquet"]
    for name in mine:
        place.write(there.at(name), "mine")
    there.clear()
    assert _keys(there) == mine
    with pytest.raises(OutputError, match="already has other files in it"):
        there.existing_plan()
    place.remove(there.at("notes.txt"))
    for name in ("_other", "sub"):
        place.remove_directory(there.at(name))
    assert there.existing_plan() is None


def test_output_on_an_object_of_somebody_is_refused(s3: S3, prefix: str) -> None:
    s3.put(prefix, b"mine")
    with pytest.raises(OutputError, match="already has other files in it"):
        OutputDirectory(s3.url(prefix)).existing_plan()


def test_output_survives_a_store_that_fails_in_passing(s3: S3, prefix: str) -> None:
    output = _started(s3.url(prefix))
    for kind in ("slow_down", "drop"):
        s3.server.fail(kind, lambda request: request.method == "PUT" and prefix in request.path)
    assert output.promote(_attempt(output, 0))
    assert s3.server.faults == []
    with output.open("part-000000.parquet") as file:
        assert pq.read_table(file).equals(TABLE.slice(0, 3))


def test_output_commits_nothing_that_its_ledger_does_not_have(
    s3: S3, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    output = _started(s3.url(prefix))
    s3.server.fail("slow_down", lambda request: "ledger" in request.path)
    attempt = _attempt(output, 0)
    with pytest.raises(OutputError, match=r"Committing part-000000\.parquet .* slow down"):
        output.promote(attempt)
    assert output.parts == []
    again = OutputDirectory(s3.url(prefix))
    again.resume(1)
    assert again.parts == []
    assert again.promote(_attempt(again, 0))
    with pytest.raises(OutputError, match=r"Committing part-000001\.parquet .* no such file"):
        again.promote(Attempt(1, f"{again.attempts}/gone.parquet", 1, "", TALLY))


def test_output_mistakes_are_told(s3: S3, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    nowhere = OutputDirectory(s3.url(prefix).replace(f"@{BUCKET}/", "@nowhere/"))
    with pytest.raises(OutputError, match="can't be read: there is no bucket 'nowhere'"):
        nowhere.existing_plan()
    output = OutputDirectory(s3.url(prefix))
    for act, told in (
        (lambda: output.existing_plan(), "can't be read: access is denied"),
        (lambda: output.finished, "can't be read: access is denied"),
        (lambda: output.create({}), "can't be written to: access is denied"),
        (lambda: output.resume(1), "can't be taken up: access is denied"),
        (lambda: output.clear(), "Clearing .* failed: access is denied"),
        (lambda: output.finish({}), "Finishing .* failed: access is denied"),
        (lambda: _attempt(output, 0), r"0\.parquet failed: access is denied"),
        (lambda: output.read_manifest(), "no finished output: .*access is denied"),
    ):
        s3.server.fail("denied", lambda _: True)
        with pytest.raises(OutputError, match=told) as caught:
            act()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
