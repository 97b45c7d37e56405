"""A server on the bundled set, in a thread of this process, and clients of it."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import httpx2
import torch
import uvicorn
from PIL import Image

from stepfuse.fuse.sampling.shared_forwards import SharedForwards
from stepfuse.scripts.serve.access import Access
from stepfuse.scripts.serve.address import listen
from stepfuse.scripts.serve.app import Service, make_app
from stepfuse.scripts.serve.engine import Engine
from stepfuse.scripts.serve.job import Job
from stepfuse.scripts.serve.metrics import Metrics
from stepfuse.scripts.serve.run import make_service
from stepfuse.scripts.serve.settings import ServeSettings

PATH = "/v1/images/generations"


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server and its address."""

    service: Service
    url: str

    def post(self, body, **options):
        return httpx2.post(f"{self.url}{PATH}", json=body, timeout=120, **options)

    def draw(self, body) -> list[bytes]:
        """The files of a request that succeeds."""
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        return [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]

    def draw_together(self, bodies) -> list[list[bytes]]:
        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(self.draw, bodies))

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.split(" ")[0] == name), 0.0)


def load_service(*sets) -> Service:
    """A service of sets, not started, with forwards of up to 6 rows."""
    settings = ServeSettings(port=0, max_rows=6)
    return make_service(sets, settings, access=Access(), dtype=torch.float32, device="cpu")


def another(
    service: Service, *, exact: bool = True, max_rows: int = 6, max_waiting: int = 64, **changes: Any
) -> Service:
    """A service of the same sets, on the network that another one leaves alone meanwhile.

    With `exact`, its forwards have the numbers of rows that the other one has found.
    """
    old = service.engine.forwards
    forwards = copy(old) if exact else SharedForwards(old.backbone, old.adapters, max_rows=max_rows, exact=False)
    metrics = Metrics()
    engine = Engine(forwards, metrics=metrics, max_waiting=max_waiting)
    given = {"limits": service.limits, "access": service.access, "time_limit": service.time_limit} | changes
    return Service(list(service.sets.values()), engine, metrics, **given)


@contextmanager
def running_service(service: Service) -> Iterator[Running]:
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(service=service, url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def drawn_together(forwards: SharedForwards, draws) -> list[torch.Tensor]:
    """What functions of `predict` draw at the same time, in the forwards of one engine."""
    engine = Engine(forwards, metrics=Metrics(), max_waiting=len(draws))
    results: dict[int, torch.Tensor | BaseException] = {}
    for index, draw in enumerate(draws):
        job = Job(
            draw=lambda job, draw=draw: draw(job.predict),
            images=1,
            notify=lambda *_: None,
            finish=lambda result, index=index: results.update({index: result}),
        )
        engine.submit(job)
    engine.start()
    engine.stop()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[index] for index in range(len(draws))]


def events_of(text: str) -> list[tuple[str, dict]]:
    """The events of a stream, by name, with their data."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


def picture(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def settings_of(file: bytes) -> dict:
    """The settings in a PNG."""
    return json.loads(picture(file).text["stepfuse"])
