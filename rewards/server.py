"""An HTTP server for one reward: `POST /score` receives and returns messages of worker/messages.py."""

import contextlib
import hmac
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from stepfuse.data.images import from_bytes
from stepfuse.rewards.protocol import Reward, Scores, score
from stepfuse.rewards.worker.messages import MAX_BODY_BYTES, MessageError, decode, encode


class RewardServer(ThreadingHTTPServer):
    """Score batches one at a time, for clients that send the token.

    The protocol is HTTP without encryption. For clients on other machines, use a tunnel or a proxy that encrypts.

    Args:
        name: Name of the reward in error messages.
        address: Host and port; port 0 selects a free port.
        token: Token of at least 16 characters that clients must send.
        device: Device that images are moved to.

    Raises:
        ValueError: If the token is too short, or the server cannot listen on the address.
    """

    daemon_threads = True

    def __init__(
        self, reward: Reward, *, name: str, address: tuple[str, int], token: str, device: str | torch.device = "cpu"
    ) -> None:
        if len(token) < 16:
            raise ValueError(f"the token has {len(token)} characters; expected at least 16")
        self.reward, self.name, self.token, self.device = reward, name, token, torch.device(device)
        self.lock = threading.Lock()
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot listen on {address[0]}:{address[1]} ({reason})") from error

    @property
    def url(self) -> str:
        """Address of the server, with the actual port."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def score(self, pixels: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Score images of dtype uint8 and shape (batch, height, width, 3)."""
        with self.lock, torch.no_grad():
            return score(self.reward, from_bytes(pixels, self.device), prompts, name=self.name)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds to wait for data of a request
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        stated = self.headers.get("Content-Length", "")
        length = int(stated) if stated.isascii() and stated.isdecimal() else None
        authorization = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(authorization, f"Bearer {self.server.token}".encode()):
            return self._refuse(HTTPStatus.UNAUTHORIZED, "wrong token", unread=length or 0)
        if self.path != "/score":
            return self._refuse(HTTPStatus.NOT_FOUND, "unknown path; expected /score", unread=length or 0)
        if length is None:
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "the header Content-Length is missing or invalid")
        if length > MAX_BODY_BYTES:  # too large to be read and discarded
            reason = f"more than {MAX_BODY_BYTES} bytes; send fewer images"
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        try:
            header, arrays = decode(self.rfile.read(length))
            values = self.server.score(*_validate(header, arrays))
        except MessageError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except ValueError as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except Exception as error:  # for example out of memory: reported to the client, and the server continues
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, reason)
        answer = encode({"kind": "scores", "id": header.get("id")}, [values.double().cpu().numpy()])
        self._send(HTTPStatus.OK, "application/octet-stream", answer)

    def do_GET(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "method not allowed; expected POST /score")

    def _refuse(self, status: HTTPStatus, reason: str, *, unread: int = 0) -> None:
        """Respond with an error, after the unread bytes of the request: clients read only after sending all."""
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has closed the connection
            left = min(unread, MAX_BODY_BYTES)
            while left > 0 and (part := self.rfile.read(min(left, 2**20))):
                left -= len(part)
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has closed the connection
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log requests."""


def _validate(header: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """The images and prompts of a request."""
    prompts = header.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise MessageError("prompts are not a list of strings")
    shape, dtype = (arrays[0].shape, arrays[0].dtype.name) if len(arrays) == 1 else ((), "no")
    if len(shape) != 4 or shape[3] != 3 or dtype != "uint8" or shape[0] != len(prompts) or 0 in shape:
        raise MessageError(
            f"images are {dtype} {shape} for {len(prompts)} prompts; expected uint8 (batch, height, width, 3)"
        )
    return arrays[0], prompts
