"""What happens to every request before a route sees it, and to every answer."""

from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepfuse.scripts.serve.access import Access
from stepfuse.scripts.serve.errors import RequestError

SECURITY = {  # the page runs its own scripts only, and nothing is taken for what it is not
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Refuses requests that have no access, and adds headers to all answers.

    An ASGI application around another, and not one of Starlette's function middlewares, which stand between a stream
    and the news that its client has left.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        app: Any = self._app
        try:
            self._access.check(scope["path"], Headers(scope=scope))
        except RequestError as error:
            app = JSONResponse(error.body, status_code=error.status, headers=error.headers)
        await app(scope, receive, with_headers)
