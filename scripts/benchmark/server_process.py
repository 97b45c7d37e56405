"""A `stepfuse serve` process on a free port of this machine, and requests to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

START_SECONDS = 900.0  # loading a large base, and measuring which numbers of rows agree


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """A server that listens.

    Attributes:
        process: which writes nothing more to its standard output.
        token: that requests send, if there is one.
    """

    process: subprocess.Popen[str]
    port: int
    token: str = ""

    def connect(self, *, timeout: float = 600.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """The status and the body of an answer, over a connection of its own."""
        connection = self.connect()
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, self.headers | {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stop(self, *, seconds: float = 90.0) -> int:
        """Send SIGTERM, and wait for the exit status; a process that does not end in time is killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def server_process(
    sets: Sequence[str], options: Sequence[str] = (), *, threads: int | None = None, token: str = ""
) -> Iterator[ServerProcess]:
    """Start `stepfuse serve` and wait until it listens; it is ended with the block.

    Args:
        options: of the command line, beside the port.
        threads: of the CPU; by default as many as torch chooses.

    Raises:
        ValueError: where the server does not start, with the last line that it printed.
    """
    environment: Mapping[str, str] = {
        **os.environ,
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        **({"STEPFUSE_SERVE_TOKEN": token} if token else {}),
    }
    command = [sys.executable, "-m", "stepfuse.scripts.cli.main", "serve", *sets, "--port", "0", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=environment
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # printed once it listens; nothing at the end of a process that fails
            found = re.search(r" at http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                process.wait(START_SECONDS)
                errors.seek(0)
                *_, last = ["no message", *errors.read().splitlines()]
                raise ValueError(f"stepfuse serve did not start: {last}")
            yield ServerProcess(process=process, port=int(found[1]), token=token)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
