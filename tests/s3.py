"""A real S3 server on loopback for tests, and a proxy in front of it that fails when told to."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest

Fault = Literal["refuse", "drop", "lose", "cut", "hang"]
"""503; hang up before, or after the server did it; half an answer; no answer."""
_SERVER = "KVPIPE_TEST_S3"
"""Environment variable with the server itself, whatever stands in front of it."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a server in a process of its own; ended with the session."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("s3_server.py"))], stdout=log, stderr=log, text=True
        )
        try:
            deadline = time.monotonic() + 60
            while (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", _content(log))) is None:
                assert process.poll() is None, _content(log)
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
            yield found[1]
        finally:
            process.kill()
            process.wait()


def _content(log: Any) -> str:
    return os.pread(log.fileno(), 2**16, 0).decode()


def environment(endpoint: str) -> dict[str, str]:
    """Variables with which programs find the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        _SERVER: endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a fresh bucket; the environment leads to it."""
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    raw_client().create_bucket(Bucket=name)
    return name


def raw_client() -> Any:
    """The vendor's own client, to look past the code under test and past the proxy."""
    return _raw_client(os.environ[_SERVER])


@functools.lru_cache
def _raw_client(endpoint: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


def keys_of(bucket: str, prefix: str = "") -> list[str]:
    pages = raw_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


class Proxy:
    """Forwards requests to the server; the next ones of a kind fail as told."""

    def __init__(self, server: str) -> None:
        self.faults: list[tuple[str, str, Fault, int]] = []
        """Method, part of the path, what happens, how many times more."""
        self.seen: list[tuple[str, str, Fault | None]] = []
        proxy, upstream = self, server.removeprefix("http://")
        self._lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

            def log_message(self, *args: object) -> None:
                """Says nothing."""

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy._next_fault(self.command, unquote(self.path))
                if fault == "hang":
                    proxy._ended.wait(20)
                if fault in ("drop", "hang"):
                    self._hang_up()
                    return
                if fault == "refuse":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                with contextlib.closing(http.client.HTTPConnection(upstream)) as connection:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    content = response.read()
                if fault == "lose":
                    self._hang_up()
                    return
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
                if fault == "cut":
                    self._hang_up()

            def _hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815  # http.server's names

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that is gone is none of our business."""

        self._ended = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def fail(self, method: str, part: str, fault: Fault, times: int) -> None:
        self.faults.append((method, part, fault, times))

    def count(self, method: str, part: str) -> int:
        return sum(seen == method and part in path for seen, path, _ in self.seen)

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            chosen: Fault | None = None
            for index, (wanted, part, fault, times) in enumerate(self.faults):
                if wanted in (method, "*") and part in path and times > 0:
                    self.faults[index] = (wanted, part, fault, times - 1)
                    chosen = fault
                    break
            self.seen.append((method, path, chosen))
            return chosen


@pytest.fixture
def proxy(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The environment leads through it."""
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


def s3_path(location: str) -> tuple[str, str]:
    """Bucket and key of a URL."""
    name, _, key = location.removeprefix("s3://").partition("/")
    return name, key


def put_raw(location: str, content: bytes) -> None:
    name, key = s3_path(location)
    raw_client().put_object(Bucket=name, Key=key, Body=content)


def get_raw(location: str) -> bytes:
    name, key = s3_path(location)
    content: bytes = raw_client().get_object(Bucket=name, Key=key)["Body"].read()
    return content
