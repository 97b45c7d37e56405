"""Who may use the server: by the address it listens on, and a token."""

import hmac
import ipaddress
import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from stepfuse.scripts.serve.errors import RequestError

OPEN = ("/", "/health")  # paths that need no token; the page's files too


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may send requests.

    Attributes:
        token: that clients must send; None for none.
        any_host: whether the address a browser names does not matter. Otherwise it must be this machine's, so that a
            page elsewhere cannot reach the server by a name of its own that leads here (DNS rebinding).
    """

    token: str | None = None
    any_host: bool = False

    def check(self, path: str, headers: Headers) -> None:
        """Raise a `RequestError` for a request without the token, and for another host's name."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if not self.any_host and not is_loopback(host):
            raise RequestError(
                status=403, message="the server is asked for by another host's name; use its own address", code="host"
            )
        if self.token is None or path in OPEN or path.startswith("/page/"):
            return
        given = headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise RequestError(
                status=401,
                message="the token is missing or wrong; send it as the header 'Authorization: Bearer TOKEN'",
                code="invalid_api_key",
            )
