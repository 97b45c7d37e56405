"""A reward behind HTTP: `stepfuse reward serve NAME` is the other side."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfuse.rewards.pixels import to_bytes
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.messages import MessageError, batches, decode, encode

TOKEN = "STEPFUSE_REWARD_TOKEN"


@dataclass(frozen=True, kw_only=True)
class HTTPSettings:
    """`http:` of a reward file.

    Attributes:
        url: of the server, http://127.0.0.1:8765 say.
        token_file: a file that holds the token and nothing else; by default the variable STEPFUSE_REWARD_TOKEN does.
        batch_size: images a request.
        timeout: seconds without a byte.
    """

    url: str
    token_file: str | None = None
    batch_size: int = 16
    timeout: float = 300.0


def read_token(file: Path | None) -> str | None:
    """The token of a file, by default of STEPFUSE_REWARD_TOKEN; None where there is neither.

    Raises:
        ValueError: for a file that is not there or empty, and for anything but letters, digits and signs in one line;
            the token itself is not in the message.
    """
    where = f"the variable {TOKEN}" if file is None else f"token file {file}"
    if file is not None and not file.is_file():
        raise ValueError(f"no {where}")
    token = os.environ.get(TOKEN) if file is None else file.read_text(encoding="utf-8-sig", errors="replace")
    if token is None:
        return None
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token or not (token or file is None):
        raise ValueError(f"{where} holds no token; expected one word of letters, digits and signs")
    return token or None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class HTTPReward:
    """Ask a server, batch by batch, in order; not differentiable.

    A request that breaks off is sent once more, whole: scoring changes nothing, so that twice is as good as once. The
    token goes to this address alone: redirections are not followed.

    Args:
        settings: whom to ask.
        folder: what the token file's path is relative to.

    Raises:
        ValueError: for an address that is none, or a token file that is not there.
    """

    def __init__(self, settings: HTTPSettings, *, folder: Path = Path()) -> None:
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {settings.url!r}; expected an address such as http://127.0.0.1:8765")
        self.settings = settings
        self.token = read_token(None if settings.token_file is None else folder / settings.token_file) or ""
        local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if local else []  # none between this machine and itself
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        arrays, values = to_bytes(images), [np.zeros(0)]
        for part in batches(arrays, self.settings.batch_size):
            values.append(self._ask(arrays[part], list(prompts[part])))
        return torch.from_numpy(np.concatenate(values)).float().to(images.device)

    def _ask(self, arrays: np.ndarray, prompts: list[str]) -> np.ndarray:
        url, problem = self.settings.url, ""
        request = urllib.request.Request(
            url.rstrip("/") + "/score",
            data=encode({"kind": "score", "id": 0, "prompts": prompts}, [arrays]),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/octet-stream"},
        )
        for _ in range(2):
            try:
                with self._opener.open(request, timeout=self.settings.timeout) as response:
                    header, answers = decode(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    raise ValueError(self._refusal(error)) from error
            except (MessageError, http.client.HTTPException) as error:
                problem = f"sent what is no answer ({' '.join(str(error).split())})"
            except TimeoutError as error:  # not again: what it was asked it may still be at
                raise ValueError(f"the server at {url} gave no answer in {self.settings.timeout:g} s") from error
            except OSError as error:
                problem = f"cannot be reached ({getattr(error, 'reason', error)})"
            else:
                if header.get("kind") != "scores" or len(answers) != 1 or answers[0].shape != (len(arrays),):
                    raise ValueError(f"the server at {url} sent {header.get('kind')!r} for {len(arrays)} images")
                return answers[0]
        raise ValueError(f"the server at {url} {problem}, twice; start it with `stepfuse reward serve NAME`")

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code == 401:
            where = self.settings.token_file or f"the variable {TOKEN}"
            return f"the server at {self.settings.url} refuses the token; it is taken from {where}"
        said = error.read(2000).decode(errors="replace").strip()
        return f"the server at {self.settings.url} answers {error.code}: {said or error.reason}"
