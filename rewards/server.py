"""Serve one reward over HTTP: POST /score takes and gives the messages of worker/messages.py."""

import contextlib
import hmac
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from stepfuse.rewards.protocol import Reward, Scores, score
from stepfuse.rewards.worker.messages import LARGEST_BODY, MessageError, decode, encode


class RewardServer(ThreadingHTTPServer):
    """Scores one batch at a time, whoever asks; every request brings the token.

    The protocol is plain HTTP: beyond one machine, put it behind a tunnel or a proxy that encrypts.

    Args:
        reward: what is served.
        name: in messages.
        address: host and port; port 0 takes a free one.
        token: what clients must know; at least 16 characters.
        device: where images are put.

    Raises:
        ValueError: for a short token, or an address that cannot be listened on.
    """

    daemon_threads = True

    def __init__(
        self, reward: Reward, *, name: str, address: tuple[str, int], token: str, device: str | torch.device = "cpu"
    ) -> None:
        if len(token) < 16:
            raise ValueError(f"a token of {len(token)} characters; expected 16 or more")
        self.reward, self.name, self.token, self.device = reward, name, token, torch.device(device)
        self.lock = threading.Lock()
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot listen on {address[0]}:{address[1]} ({reason})") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def score(self, pixels: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Uint8 (batch, height, width, 3) and prompts → scores."""
        with self.lock, torch.no_grad():  # one batch at a time on the device, whoever asks
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
            return score(self.reward, images, prompts, name=self.name)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds for the bytes of a request
    protocol_version = "HTTP/1.1"
    unread: int | None = 0  # bytes of the request

    def do_POST(self) -> None:
        self.unread = _length(self.headers.get("Content-Length"))
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return self._refuse(HTTPStatus.UNAUTHORIZED, "a wrong token")
        if self.path != "/score":
            return self._refuse(HTTPStatus.NOT_FOUND, "only /score is here")
        length = self.unread
        if length is None:
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "a request without its length")
        if length > LARGEST_BODY:
            self.unread = 0  # too much to be read only to be thrown away
            return self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_BODY} bytes; send fewer images"
            )
        self.unread = 0
        try:
            header, arrays = decode(self.rfile.read(length))
            pixels, prompts = _checked(header, arrays)
        except (MessageError, KeyError, TypeError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        try:
            values = self.server.score(pixels, prompts)
        except ValueError as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except Exception as error:  # out of memory, say: the client is told, and the server goes on
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, reason)
        self._send(
            HTTPStatus.OK,
            "application/octet-stream",
            encode({"kind": "scores", "id": header.get("id")}, [values.double().cpu().numpy()]),
        )

    def do_GET(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "POST /score")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # who is still sending does not read the answer
            left = min(self.unread or 0, LARGEST_BODY)
            while left > 0 and (part := self.rfile.read(min(left, 2**20))):
                left -= len(part)
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        with contextlib.suppress(OSError):  # a client that has given up
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line a batch is noise."""


def _length(header: str | None) -> int | None:
    return int(header) if header is not None and header.isascii() and header.isdecimal() else None


def _checked(header: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    prompts = header.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise MessageError("prompts are not a list of strings")
    shape, kind = (arrays[0].shape, arrays[0].dtype.name) if len(arrays) == 1 else ((), "no")
    if len(shape) != 4 or shape[3] != 3 or kind != "uint8" or shape[0] != len(prompts) or 0 in shape:
        raise MessageError(
            f"images are {kind} {shape} for {len(prompts)} prompts; expected uint8 (batch, height, width, 3)"
        )
    return arrays[0], prompts
