"""The server's HTTP interface, in the shape of OpenAI's for images."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from stepfuse.scripts.serve.access import Access
from stepfuse.scripts.serve.drawing import Limits, read_drawing
from stepfuse.scripts.serve.engine import Engine
from stepfuse.scripts.serve.errors import RequestError, left
from stepfuse.scripts.serve.guard import Guard
from stepfuse.scripts.serve.metrics import Metrics
from stepfuse.scripts.serve.pending import Pending
from stepfuse.scripts.serve.pictures import files_of
from stepfuse.scripts.serve.prepared import Prepared, prepare
from stepfuse.scripts.serve.served_sets import ServedSet

LOG = logging.getLogger("stepfuse.serve")
BODY_BYTES, BODY_SECONDS = 2**20, 30
THREADS = 2
VERSION = version("stepfuse")
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "png": "image/png"}


class Service:
    """What the routes share.

    Args:
        time_limit: seconds after which a request is given up.
    """

    def __init__(
        self,
        sets: Sequence[ServedSet],
        engine: Engine,
        metrics: Metrics,
        *,
        limits: Limits,
        access: Access,
        time_limit: float,
    ) -> None:
        self.sets: Mapping[str, ServedSet] = {each.name: each for each in sets}
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.access, self.time_limit = access, time_limit
        self._described = [each.describe() for each in sets]
        # Requests are checked and files are made by few threads: each thread that there ever was keeps memory.
        self._threads = anyio.CapacityLimiter(THREADS)

    def describe(self) -> dict[str, Any]:
        limits = self.limits
        return {
            "stepfuse": VERSION,
            "sets": self._described,
            "limits": {
                "images": limits.images,
                "frames": limits.frames,
                "steps": limits.steps,
                "prompt_characters": limits.prompt_characters,
                "pixels": limits.pixels,
                "rows": self.engine.forwards.max_rows,
            },
        }

    async def prepared(self, request: Request) -> Prepared:
        body = await _json(request)
        drawing = read_drawing(body, self.limits)
        return await anyio.to_thread.run_sync(
            prepare, drawing, self.sets, self.engine.forwards.max_rows, limiter=self._threads
        )

    async def generate(self, request: Request) -> Response:
        """Draw, or begin to stream."""
        begin = time.monotonic()
        prepared = await self.prepared(request)
        client = request.client.host if request.client else ""
        pending = Pending(prepared, self.engine, client=client, begin=begin, time_limit=self.time_limit)
        pending.submit()
        if prepared.drawing.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self._events(pending), media_type="text/event-stream", headers=headers)
        pixels = await pending.result(request)
        pictures = await self._pictures(prepared, pixels)
        self.metrics.request(200, images=prepared.drawing.count, seconds=pending.seconds)
        return JSONResponse(
            {
                "created": int(time.time()),
                "output_format": prepared.drawing.output_format,
                "size": f"{prepared.size[1]}x{prepared.size[0]}",
                "data": pictures,
            }
        )

    async def _events(self, pending: Pending) -> AsyncIterator[str]:
        """Progress, then the pictures, as server-sent events; the request is cancelled where the client leaves."""
        prepared, done = pending.prepared, False
        try:
            async for progress in pending.progress():
                yield _event("image_generation.progress", progress)
            pixels = await pending.result()
            for index, picture in enumerate(await self._pictures(prepared, pixels)):
                more = {
                    "index": index,
                    "created_at": int(time.time()),
                    "size": f"{prepared.size[1]}x{prepared.size[0]}",
                    "output_format": prepared.drawing.output_format,
                    "quality": "auto",
                    "background": "opaque",
                }
                yield _event("image_generation.completed", picture | more)
            done = True
            self.metrics.request(200, images=prepared.drawing.count, seconds=pending.seconds)
        except RequestError as error:
            done = True
            self.metrics.request(error.status)
            yield _event("error", error.body)
        except Exception as error:
            done = True
            LOG.error("a stream failed", exc_info=error)
            self.metrics.request(500)
            yield _event("error", _internal().body)
        finally:
            if not done:
                pending.cancel()
                self.metrics.request(499)

    async def _pictures(self, prepared: Prepared, pixels: Any) -> list[dict[str, Any]]:
        drawing = prepared.drawing
        settings = [prepared.settings(index) for index in range(drawing.count)]
        if drawing.layout != "images":
            settings = [prepared.settings_of_all()]
        pictures = await anyio.to_thread.run_sync(
            files_of, pixels, settings, drawing.layout, drawing.output_format, limiter=self._threads
        )
        return [
            {"b64_json": base64.b64encode(picture).decode(), "seed": of["seed"], "settings": of}
            for picture, of in zip(pictures, settings, strict=True)
        ]


def make_app(service: Service) -> Guard:
    """The routes of a service, which ends with them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await anyio.to_thread.run_sync(service.engine.stop)

    app = FastAPI(title="stepfuse", version=VERSION, lifespan=lifespan, openapi_url=None)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _answer(service, request, _internal())

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _answer(service, request, error)

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> Response:
        return _answer(service, request, RequestError(status=404, message="no such path here; see GET /v1/sets"))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> Response:
        message = f"{request.method} is not a method of this path"
        return _answer(service, request, RequestError(status=405, message=message))

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await service.generate(request)

    @app.get("/v1/sets")
    async def sets() -> Response:
        return JSONResponse(service.describe())

    @app.get("/v1/models")
    async def models() -> Response:
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "stepfuse"} for name in service.sets]
        return JSONResponse({"object": "list", "data": entries})

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        status = "stopping" if engine.is_stopping else "failing" if engine.is_failing else "ok"
        state = {"status": status, "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(state, status_code=200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = {
        entry.name: entry.read_bytes() for entry in files(__package__).joinpath("page").iterdir() if entry.is_file()
    }

    @app.get("/")
    async def index() -> Response:
        return _page_file(page, "index.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        return _page_file(page, name)

    return Guard(app, service.access)


def _page_file(page: Mapping[str, bytes], name: str) -> Response:
    kind = KINDS.get(name.rpartition(".")[2])
    if name not in page or kind is None:
        raise RequestError(status=404, message="the page has no such file")
    return Response(page[name], media_type=kind, headers={"Cache-Control": "no-cache"})


async def _json(request: Request) -> Any:
    """The request's JSON, of a limited size; NaN and infinity are not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site cannot send without asking
        raise RequestError(status=415, message=f"the content type is {kind[:100]!r}; expected application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    message = f"the request is larger than {BODY_BYTES:,} bytes; send a shorter prompt"
                    raise RequestError(status=413, message=message)
    except TimeoutError:
        message = f"the request did not arrive within {BODY_SECONDS} s; send it again"
        raise RequestError(status=408, message=message) from None
    except ClientDisconnect:
        raise left() from None

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a number in JSON")

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except UnicodeDecodeError:
        raise RequestError(message="the request is not UTF-8; send JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(message=f"the request is not JSON: {reason}") from None


def _answer(service: Service, request: Request, error: RequestError) -> Response:
    if request.url.path == "/v1/images/generations":
        service.metrics.request(error.status)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _internal() -> RequestError:
    return RequestError(status=500, message="the server failed; its log says why", code="internal")


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
