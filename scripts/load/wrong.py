"""Requests that a server refuses, each with the status that it must answer."""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepfuse.scripts.benchmark.server_process import ServerProcess

PATH = "/v1/images/generations"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A request that is refused.

    Attributes:
        counted: whether the server counts it among the requests for images.
    """

    status: int
    body: bytes = b""
    method: str = "POST"
    path: str = PATH
    headers: Mapping[str, str] | None = None
    counted: bool = True


def wrong_requests(case: Mapping[str, Any]) -> dict[str, Wrong]:
    """By what is wrong with them; otherwise they are as `case`."""

    def changed(status: int, **fields: Any) -> Wrong:
        return Wrong(status=status, body=json.dumps({**case, **fields}).encode())

    good = json.dumps(case).encode()
    return {
        "unknown objective": changed(400, weights={"beauty": 1.0}),
        "weight NaN": changed(400, weights={"alignment": float("nan")}),
        "weight infinite": changed(400, weights={"alignment": float("inf")}),
        "weights sum to 0": changed(400, weights={"alignment": 0}),
        "negative strength": changed(400, strength=-1),
        "unknown rule": changed(400, rule="prodct"),
        "rule in a file": changed(400, rule="rule.py:Rule"),
        "odd size": changed(400, size="63x64"),
        "enormous size": changed(400, size="99999x99999"),
        "no images": changed(400, n=0),
        "many images": changed(400, n=1000),
        "many steps": changed(400, steps=100_000),
        "no mixtures": changed(400, weights=[]),
        "unknown field": changed(400, sead=1),
        "long prompt": changed(400, prompt="a" * 5000),
        "lone surrogate": Wrong(status=400, body=b'{"prompt": "\\ud800"}'),
        "format url": changed(400, response_format="url"),
        "unknown model": changed(404, model="emojy"),
        "10 MB": changed(413, prompt="a" * 10_000_000),
        "not JSON": Wrong(status=400, body=good[:-3]),
        "not UTF-8": Wrong(status=400, body=b'{"prompt": "\xff"}'),
        "nested": Wrong(status=400, body=b"[" * 100_000),
        "a list": Wrong(status=400, body=b"[]"),
        "empty": Wrong(status=400),
        "content type": Wrong(status=415, body=good, headers={"Content-Type": "text/plain"}),
        "method": Wrong(status=405, method="DELETE"),
        "token": Wrong(status=401, body=good, headers={"Authorization": "Bearer wrong"}, counted=False),
        "path": Wrong(status=404, path="/v1/images/edits", body=good, counted=False),
    }


def send_wrong(server: ServerProcess, wrong: Wrong) -> int:
    """The status of the answer; the body is sent until there is one, as other clients do."""
    headers = {"Content-Type": "application/json", **server.headers, **(wrong.headers or {})}
    with raw_request(server, wrong.method, wrong.path, headers, len(wrong.body)) as connection:
        connection.setblocking(False)
        rest = memoryview(wrong.body)
        while rest:
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except BlockingIOError:
                pass
            try:
                rest = rest[connection.send(rest[:65536]) :]
            except BlockingIOError:
                time.sleep(0.001)
        connection.settimeout(600)
        return read_status(connection)


def raw_request(
    server: ServerProcess, method: str, path: str, headers: Mapping[str, str], length: int
) -> socket.socket:
    """A connection over which the head of a request was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=600)
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def read_status(connection: socket.socket) -> int:
    """The status of an answer; 0 where there is none."""
    line = b""
    while b"\r\n" not in line:
        part = connection.recv(4096)
        if not part:
            return 0
        line += part
    return int(line.split()[1])
