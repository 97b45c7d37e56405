"""A reward behind HTTP: `stepfuse reward serve NAME` is the other side."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepfuse.rewards.pixels import to_bytes
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.messages import MessageError, decode, encode

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


class HTTPReward:
    """Ask a server, batch by batch, in order; not differentiable.

    A request that breaks off is sent once more, whole: scoring changes nothing, so that twice is as good as once.

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
        self.token = os.environ.get(TOKEN, "")
        if settings.token_file is not None:
            file = folder / settings.token_file
            if not file.is_file():
                raise ValueError(f"no token file {file}")
            self.token = file.read_text().strip()

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        arrays, size, values = to_bytes(images), self.settings.batch_size, [np.zeros(0)]
        for first in range(0, len(arrays), size):
            values.append(self._ask(arrays[first : first + size], list(prompts[first : first + size])))
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
                with urllib.request.urlopen(request, timeout=self.settings.timeout) as response:
                    header, answers = decode(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    raise ValueError(self._refusal(error)) from error
            except (MessageError, http.client.HTTPException) as error:
                problem = f"sent what is no answer ({' '.join(str(error).split())})"
            except TimeoutError:
                problem = f"gave no answer in {self.settings.timeout:g} s"
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
