"""A reward on a server that `stepfuse reward serve NAME` runs."""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse.data.settings_fields import setting
from stepfuse.rewards.token_file import TOKEN, read_token
from stepfuse.rewards.worker.messages import MessageError, decode
from stepfuse.rewards.worker.remote import RemoteReward, RequestError


@dataclass(frozen=True, kw_only=True)
class HTTPSettings:
    """The key `http:` of a reward file.

    Attributes:
        url: Address of the server, such as http://127.0.0.1:8765.
        token_file: File that holds only the token; by default the token is the value of STEPFUSE_REWARD_TOKEN.
        batch_size: Maximum number of images per request.
        timeout: Seconds after which a request without any received byte fails.
    """

    url: str
    token_file: str | None = None
    batch_size: int = setting(16, above=0)
    timeout: float = setting(300.0, above=0, finite=False)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class HTTPReward(RemoteReward):
    """A reward on a server. A request that fails is sent once more; a request that times out is not.

    The token is sent to this address only: redirects are not followed, and no proxy is used for the local machine.

    The path of the token file is relative to the folder.

    Raises:
        ValueError: If the address is invalid, or the token file is missing or invalid.
    """

    def __init__(self, settings: HTTPSettings, *, folder: Path = Path()) -> None:
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {settings.url!r}; expected an address such as http://127.0.0.1:8765")
        self.settings, self.label, self.batch_size = settings, f"the server at {settings.url}", settings.batch_size
        self.token = read_token(None if settings.token_file is None else folder / settings.token_file) or ""
        local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def exchange(self, message: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
        request = urllib.request.Request(
            self.settings.url.rstrip("/") + "/score",
            data=message,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/octet-stream"},
        )
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return decode(response.read())
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(2000).decode(errors="replace").strip() or error.reason
            if error.code == HTTPStatus.UNAUTHORIZED:
                source = self.settings.token_file or f"the variable {TOKEN}"
                raise ValueError(f"{self.label} rejects the token from {source}") from error
            raise ValueError(f"{self.label} responded with status {error.code}: {reason}") from error
        except MessageError as error:
            raise ValueError(f"{self.label} sent an invalid response: {error}") from error
        except http.client.HTTPException as error:
            raise RequestError(f"sent an invalid response ({' '.join(str(error).split())})") from error
        except TimeoutError as error:  # not repeated: the server may still be computing the first request
            raise ValueError(f"{self.label} did not answer within {self.settings.timeout:g} s") from error
        except OSError as error:
            raise RequestError(f"cannot be reached ({getattr(error, 'reason', error)})") from error

    def recover(self) -> str:
        return "start the server with `stepfuse reward serve NAME`"
