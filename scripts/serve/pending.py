"""A request that is in the engine's hands, seen from the event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import Any

from fastapi import Request
from torch import Tensor

from stepfuse.scripts.serve.engine import Engine
from stepfuse.scripts.serve.errors import left
from stepfuse.scripts.serve.job import Job
from stepfuse.scripts.serve.prepared import Prepared

REPEAT_SECONDS = 15


class Pending:
    """A request between its submission and its answer."""

    def __init__(self, prepared: Prepared, engine: Engine, *, client: str, begin: float, time_limit: float) -> None:
        self.prepared, self._engine = prepared, engine
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[Tensor] = self._loop.create_future()
        self._latest = 0, 0, 0
        self._news = asyncio.Event()
        self._begin = begin
        self._job: Job | None = Job(  # None once it is over: the job refers to this object, and both to the pixels
            draw=lambda job: prepared.draw(job.predict, job.notify),
            images=prepared.drawing.count,
            notify=lambda *state: self._call(self._progressed, state),
            finish=lambda result: self._call(self._finish, result),
            client=client,
            low=prepared.drawing.low,
            since=begin,
            deadline=begin + time_limit,
        )

    @property
    def seconds(self) -> float:
        """Since it came."""
        return monotonic() - self._begin

    def submit(self) -> None:
        assert self._job is not None
        self._engine.submit(self._job)

    def cancel(self) -> None:
        if self._job is not None:
            self._engine.cancel(self._job)
            self._job = None

    async def result(self, request: Request | None = None) -> Tensor:
        """The pixels; the job is given up where the client of the request leaves meanwhile.

        Raises:
            RequestError: why there are none.
        """
        if request is None:
            return await self._finished
        leaving = asyncio.ensure_future(_disconnected(request))
        either: list[asyncio.Future[Any]] = [self._finished, leaving]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._finished.done():
                raise left()
            return self._finished.result()
        finally:
            leaving.cancel()
            if not self._finished.done():
                self.cancel()

    async def progress(self) -> AsyncIterator[dict[str, int]]:
        """The steps that are done, as they are; of several since the last look only the latest.

        Without news the last are repeated after a while, so that proxies do not take the stream for a dead one.
        """
        self._finished.add_done_callback(lambda _: self._news.set())
        while not self._finished.done():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), REPEAT_SECONDS)
            self._news.clear()
            step, steps, position = self._latest
            yield {"step": step, "steps": steps or self.prepared.steps, "position": position}

    def _call(self, function: object, value: object) -> None:
        """Call a function in the event loop, from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(function, value)  # type: ignore[arg-type]
        except RuntimeError:  # the loop has ended, and nobody waits
            return

    def _progressed(self, state: tuple[int, int, int]) -> None:
        self._latest = state
        self._news.set()

    def _finish(self, result: Tensor | BaseException) -> None:
        self._job = None
        if self._finished.done():
            return
        if isinstance(result, BaseException):
            self._finished.set_exception(result)
            self._finished.exception()  # it is raised where it is waited for, and not reported if it never is
        else:
            self._finished.set_result(result)


async def _disconnected(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
