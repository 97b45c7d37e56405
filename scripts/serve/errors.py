"""What is answered to a request that is not drawn."""

from dataclasses import dataclass
from typing import Any

LONGEST = 600  # characters of a message, which may quote what was sent
KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # OpenAI's names; others by the first digit


@dataclass(kw_only=True, eq=False)  # not frozen: an exception's traceback is assigned to it where it is handled
class RequestError(Exception):
    """A request that is refused, or failed.

    Attributes:
        message: one sentence that names the culprit and the remedy.
        status: of HTTP.
        param: the field of the request that is at fault.
        code: a word for programs.
        retry_after: seconds after which it may be sent again.
    """

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 3] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return more if self.retry_after is None else more | {"Retry-After": str(self.retry_after)}


def left() -> RequestError:
    """Of a client that has left, which nobody reads; the status is that of nginx."""
    return RequestError(status=499, message="the client has left", code="left")


def stopping() -> RequestError:
    message = "the server is stopping; send the request to another one"
    return RequestError(status=503, message=message, code="stopping", retry_after=5)


def out_of_memory() -> RequestError:
    message = "the server ran out of memory for this request; send a smaller size or fewer images"
    return RequestError(status=503, message=message, code="out_of_memory", retry_after=30)


def internal() -> RequestError:
    message = "the server failed; its log says why"
    return RequestError(status=500, message=message, code="internal")


def queue_full(waiting: int, seconds: int) -> RequestError:
    noun = "request waits" if waiting == 1 else "requests wait"
    message = f"the queue is full, {waiting} {noun}; send it again in {seconds} s"
    return RequestError(status=429, message=message, code="queue_full", retry_after=seconds)


def late(seconds: float, *, begun: bool) -> RequestError:
    message = (
        f"{'not finished' if begun else 'not begun'} within the time limit of {seconds:.0f} s; ask for fewer images or "
        "steps, or try later"
    )
    return RequestError(status=504, message=message, code="time_limit")
