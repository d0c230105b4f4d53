"""Servers that tests read from and write to: S3 with faults in its way, and a small web server."""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow.fs as pafs

BUCKET = "data"
KEY, SECRET = "AKIATESTKEY", "top/secret+of+tests"

_XML = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'


@dataclass(frozen=True)
class Request:
    """What a server was asked for."""

    method: str
    path: str
    range: str | None
    user_key: str | None


@dataclass
class Server:
    """A server on this machine that notes requests and can be told to fail some."""

    address: str
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[Callable[[Request], bool], str]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    """Set once a request is held."""
    released: threading.Event = field(default_factory=threading.Event)

    def fail(self, kind: str, match: Callable[[Request], bool], times: int = 1) -> None:
        """Fails the next requests that match: "slow_down", "denied", "drop", "cut" or "hold"."""
        self.faults += [(match, kind)] * times

    def fault(self, request: Request) -> str | None:
        """Notes a request; says how it has to fail."""
        self.requests.append(request)
        for index, (match, kind) in enumerate(self.faults):
            if match(request):
                del self.faults[index]
                return kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ours: Server

    def log_message(self, *_: Any) -> None:
        pass

    def asked(self) -> Request:
        key = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        return Request(self.command, self.path, self.headers.get("Range"), key[1] if key else None)

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None
    ) -> None:
        """Answers; with `sent`, the line goes dead after so many bytes of the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:sent])
        if sent is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


_OF_ONE_LINE = ("transfer-encoding", "connection", "content-length", "date", "server")
"""Headers that go by the connection and are not passed on."""


class _Proxy(_Handler):
    """In front of S3."""

    upstream: str

    def _pass_on(self) -> None:
        body = self._body()
        kind = self.ours.fault(self.asked())
        if kind == "hold":
            self.ours.held.set()
            self.ours.released.wait(120)
        if kind in ("drop", "hold"):
            self.hang_up()
            return
        if kind in ("slow_down", "denied"):
            status, code = (503, "SlowDown") if kind == "slow_down" else (403, "AccessDenied")
            text = _XML.format(code=code, text="no").encode()
            head = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
            self.answer(status, head, text)
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        given = {k: v for k, v in self.headers.items() if k.lower() not in _OF_ONE_LINE}
        connection.request(self.command, self.path, body, given)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in _OF_ONE_LINE}
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        headers["Content-Length"] = length or str(len(content))
        self.answer(
            response.status, headers, content, sent=len(content) // 2 if kind == "cut" else None
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815


class _Web(_Handler):
    """Files from memory, by range if they may be."""

    files: dict[str, bytes]
    ranges: bool

    def _serve(self) -> None:
        kind = self.ours.fault(self.asked())
        content = self.files.get(self.path.partition("?")[0])
        if kind == "drop":
            self.hang_up()
        elif kind in ("slow_down", "denied"):
            self.answer(503 if kind == "slow_down" else 403, {"Content-Length": "0"}, b"")
        elif content is None:
            self.answer(404, {"Content-Length": "0"}, b"")
        else:
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            status = 200
            if found and self.ranges:
                status, content = 206, content[int(found[1]) : int(found[2]) + 1]
            headers = {"Content-Length": str(len(content)), "ETag": etag}
            self.answer(status, headers, content, sent=len(content) // 2 if kind == "cut" else None)

    do_GET = do_HEAD = _serve  # noqa: N815


class _Quiet(ThreadingHTTPServer):
    """A client that goes away in the middle is nothing to print."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def _serving(handler: type[_Handler], **known: Any) -> Iterator[Server]:
    bound = type("Bound", (handler,), known)
    server = _Quiet(("127.0.0.1", 0), bound)
    bound.ours = Server(f"127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield bound.ours
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def web(files: dict[str, bytes], *, ranges: bool = True) -> Iterator[Server]:
    """A web server for these files, by their paths."""
    with _serving(_Web, files=files, ranges=ranges) as server:
        yield server


class S3:
    """moto's S3, reached by a proxy that can fail; and straight, for what a test looks at."""

    def __init__(self, server: Server, upstream: str) -> None:
        self.server = server
        self.endpoint = f"http://{server.address}"
        self.files = pafs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            region="us-east-1",
            endpoint_override=f"http://{upstream}",
            allow_bucket_creation=True,
        )
        self.files.create_dir(BUCKET)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def url(self, key: str) -> str:
        """A URL that says all: the key and secret, the endpoint."""
        return f"s3://{KEY}:{SECRET}@{BUCKET}/{key}?endpoint_override={self.endpoint}"

    def name(self, key: str) -> str:
        """The URL less what says how to reach it."""
        return f"s3://{BUCKET}/{key}"

    def put(self, key: str, content: bytes) -> None:
        """Writes an object."""
        with self.files.open_output_stream(f"{BUCKET}/{key}", compression=None) as file:
            file.write(content)

    def get(self, key: str) -> bytes:
        """Reads an object."""
        with self.files.open_input_stream(f"{BUCKET}/{key}", compression=None) as file:
            return bytes(file.read())

    def keys(self, prefix: str) -> list[str]:
        """Objects below a prefix, by their keys from there; markers of directories left out."""
        selector = pafs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True)
        found = [i for i in self.files.get_file_info(selector) if i.type is pafs.FileType.File]
        return sorted(info.path.removeprefix(f"{BUCKET}/{prefix}/") for info in found)

    def parts(self, prefix: str) -> dict[str, str]:
        """As `files.parts` of a directory: each part's name and the hash of its bytes."""
        return {
            key: hashlib.sha256(self.get(f"{prefix}/{key}")).hexdigest()
            for key in self.keys(prefix)
            if key.startswith("part-")
        }


@contextmanager
def s3_server() -> Iterator[S3]:
    """A real S3 server on this machine, with a bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        upstream = "{}:{}".format(*moto.get_host_and_port())
        with _serving(_Proxy, upstream=upstream) as server:
            yield S3(server, upstream)
    finally:
        moto.stop()
