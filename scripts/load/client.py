"""A client that does what clients do: ask, stream, leave, send nonsense, and wait when it is told to."""

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from stepfuse.scripts.benchmark.server_process import ServerProcess
from stepfuse.scripts.load.cases import images_of
from stepfuse.scripts.load.tally import Tally
from stepfuse.scripts.load.wrong import PATH, Wrong, raw_request, read_status, send_wrong, wrong_requests

Event = tuple[str, dict[str, Any]]
FIELDS = ("b64_json", "seed", "settings")  # of a picture


@dataclass(frozen=True, kw_only=True)
class Solo:
    """A request, and what was answered to it when nothing else was asked for."""

    case: dict[str, Any]
    status: int
    pictures: list[dict[str, Any]]

    @property
    def images(self) -> int:
        return images_of(self.case) if self.status == 200 else 0


def answer_alone(server: ServerProcess, case: dict[str, Any]) -> Solo:
    status, body = server.ask("POST", PATH, case)
    return Solo(case=case, status=status, pictures=json.loads(body)["data"] if status == 200 else [])


class Client:
    """One client, which acts at random until it is told to stop."""

    def __init__(self, server: ServerProcess, pool: Sequence[Solo], tally: Tally, *, seed: int) -> None:
        self._server, self._pool, self._tally = server, pool, tally
        self._drawn = [each for each in pool if each.status == 200]
        self._random = random.Random(seed)
        self.wrong = wrong_requests(self._drawn[0].case)
        self.actions: dict[Callable[[], None], float] = {
            self.ask: 40,
            self.stream: 22,
            self.leave_stream: 7,
            self.leave: 7,
            self.send_nonsense: 14,
            self.disconnect: 4,
            self.truncate: 3,
            self.send_slowly: 3,
        }

    def run(self, end: threading.Event) -> None:
        while not end.is_set():
            (action,) = self._random.choices([*self.actions], [*self.actions.values()])
            self.act(action)
            end.wait(self._random.expovariate(5))

    def act(self, action: Callable[[], None]) -> None:
        """Do one thing; what goes wrong is a fault of the server's."""
        self._tally.did(action.__name__)
        try:
            action()
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self._tally.fault(f"{action.__name__}: {type(error).__name__}: {error}")

    # What it does.

    def ask(self) -> None:
        """Up to three requests over one connection."""
        with closing(self._server.connect()) as connection:
            for _ in range(self._random.randint(1, 3)):
                self._ask(connection, self._random.choice(self._pool))

    def ask_once(self) -> None:
        with closing(self._server.connect()) as connection:
            self._ask(connection, self._random.choice(self._drawn))

    def stream(self) -> None:
        solo = self._random.choice(self._pool)
        with closing(self._server.connect()) as connection:
            received = self._stream(connection, solo)
            if received is None:
                return
            pictures: dict[int, dict[str, Any]] = {}
            step = -1
            for name, data in received:
                if name == "error":
                    self._check(solo, 500, [])
                    return
                if name == "image_generation.progress":
                    if data["step"] < step:
                        self._tally.fault(f"step {data['step']} after step {step}: {solo.case}")
                    step = data["step"]
                elif data["index"] in pictures:
                    self._tally.fault(f"two pictures of index {data['index']}: {solo.case}")
                else:
                    pictures[data["index"]] = {field: data[field] for field in FIELDS}
            self._check(solo, 200, [pictures[index] for index in sorted(pictures)])

    def leave_stream(self) -> None:
        """Read a few events of a stream, and leave."""
        solo = self._random.choice(self._drawn)
        with closing(self._server.connect()) as connection:
            received = self._stream(connection, solo)
            if received is None:
                return
            for _ in zip(range(self._random.randint(0, 2)), received, strict=False):
                pass
            self._tally.abandoned(images=solo.images)

    def leave(self) -> None:
        """Send a request, and leave before the answer."""
        solo = self._random.choice(self._drawn)
        body = self._body(solo)
        with raw_request(self._server, "POST", PATH, self._headers, len(body)) as connection:
            connection.sendall(body)
            time.sleep(self._random.uniform(0, 0.5))
        self._tally.abandoned(images=solo.images)

    def send_nonsense(self) -> None:
        name = self._random.choice([*self.wrong])
        self.send_wrong(name, self.wrong[name])

    def send_wrong(self, name: str, wrong: Wrong) -> None:
        status = send_wrong(self._server, wrong)
        if status != wrong.status:
            self._tally.fault(f"{name}: answered with status {status}, expected {wrong.status}")
        if wrong.counted and status:
            self._tally.answered(status)

    def disconnect(self) -> None:
        """Leave before the answer, after it, after half of a request's head, and after what is not HTTP."""
        with raw_request(self._server, "GET", "/health", {}, 0):
            pass
        with raw_request(self._server, "GET", "/health", {}, 0) as connection:
            read_status(connection)
        for text in (b"POST /v1/images/generations HTTP/1.1\r\nHo", b"\x16\x03\x01 not HTTP\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", self._server.port)) as connection:
                connection.sendall(text)

    def truncate(self) -> None:
        """Leave in the middle of a body."""
        body = self._body(self._random.choice(self._drawn))
        with raw_request(self._server, "POST", PATH, self._headers, len(body)) as connection:
            connection.sendall(body[: self._random.randrange(len(body))])
            time.sleep(self._random.uniform(0, 0.1))
        self._tally.abandoned()

    def send_slowly(self) -> None:
        """Send a body over some seconds, byte by byte at the end."""
        solo = self._random.choice(self._drawn)
        with closing(self._server.connect()) as connection:
            body = self._body(solo)
            connection.putrequest("POST", PATH)
            for name, value in {**self._headers, "Content-Length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders(body[:-20])
            for byte in body[-20:]:
                time.sleep(0.05)
                connection.send(bytes([byte]))
            self._read(solo, connection.getresponse())

    # How.

    @property
    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **self._server.headers}

    def _body(self, solo: Solo, **fields: Any) -> bytes:
        priority = self._random.choice(("normal", "normal", "low"))
        return json.dumps({**solo.case, "priority": priority, **fields}).encode()

    def _send(self, connection: http.client.HTTPConnection, solo: Solo, **fields: Any) -> http.client.HTTPResponse:
        """Send until the queue has room, after the times that the server asks to wait."""
        while True:
            connection.request("POST", PATH, self._body(solo, **fields), self._headers)
            answer = connection.getresponse()
            if answer.status != 429:
                return answer
            answer.read()
            self._tally.answered(429)
            seconds = int(answer.headers["Retry-After"])  # a fault where it is missing
            time.sleep(min(seconds, 30))
            connection.close()  # idle connections are closed by the server too

    def _stream(self, connection: http.client.HTTPConnection, solo: Solo) -> Iterator[Event] | None:
        """The events of a request, or None where the answer has none; it is checked then."""
        answer = self._send(connection, solo, stream=True)
        if answer.status == 200:
            return events(answer)
        answer.read()
        self._check(solo, answer.status, [])
        return None

    def _ask(self, connection: http.client.HTTPConnection, solo: Solo) -> None:
        self._read(solo, self._send(connection, solo))

    def _read(self, solo: Solo, answer: http.client.HTTPResponse) -> None:
        body = answer.read()
        if answer.status == 429:  # of a slow body, which is not sent again
            self._tally.answered(429)
            return
        self._check(solo, answer.status, json.loads(body).get("data", []))

    def _check(self, solo: Solo, status: int, pictures: list[dict[str, Any]]) -> None:
        """Count an answer, and compare it with the one to the same request alone."""
        self._tally.answered(status, images=solo.images if status == 200 else 0)
        if status != solo.status:
            self._tally.fault(f"status {status}, and {solo.status} alone: {solo.case}")
        elif pictures != solo.pictures:
            self._tally.fault(f"other pictures than alone: {solo.case}")


def events(answer: http.client.HTTPResponse) -> Iterator[Event]:
    """Names and data of server-sent events."""
    name = ""
    for line in answer:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield name, json.loads(text.removeprefix("data: "))
