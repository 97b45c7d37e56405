"""Serve one reward over HTTP: POST /score takes and gives the messages of worker/messages.py."""

import hmac
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from stepfuse.rewards.protocol import Reward, Scores, score
from stepfuse.rewards.worker.messages import MessageError, decode, encode

LARGEST = 512 * 2**20  # bytes of a request


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
        except OSError as error:
            raise ValueError(f"cannot listen on {address[0]}:{address[1]} ({error.strerror or error})") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def score(self, pixels: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Uint8 (batch, height, width, 3) and prompts → scores."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        with self.lock, torch.no_grad():
            return score(self.reward, images, prompts, name=self.name)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds for the bytes of a request
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return self._refuse(HTTPStatus.UNAUTHORIZED, "a wrong token")
        if self.path != "/score":
            return self._refuse(HTTPStatus.NOT_FOUND, "only /score is here")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "a request without its length")
        if int(length) > LARGEST:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST} bytes; send fewer images")
        try:
            header, arrays = decode(self.rfile.read(int(length)))
            pixels, prompts = _checked(header, arrays)
        except (MessageError, KeyError, TypeError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        try:
            values = self.server.score(pixels, prompts)
        except ValueError as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        self._send(
            HTTPStatus.OK,
            "application/octet-stream",
            encode({"kind": "scores", "id": header.get("id")}, [values.double().cpu().numpy()]),
        )

    def do_GET(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "POST /score")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # what is left of the request is not read
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line a batch is noise."""


def _checked(header: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    prompts = header.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise MessageError("prompts are not a list of strings")
    shape, kind = (arrays[0].shape, arrays[0].dtype.name) if len(arrays) == 1 else ((), "no")
    if len(shape) != 4 or shape[3] != 3 or kind != "uint8" or not len(shape) or shape[0] != len(prompts) or 0 in shape:
        raise MessageError(
            f"images are {kind} {shape} for {len(prompts)} prompts; expected uint8 (batch, height, width, 3)"
        )
    return arrays[0], prompts
