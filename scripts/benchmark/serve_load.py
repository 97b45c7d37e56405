"""Requests at random times, sent to a server together or one after the other."""

import base64
import io
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from stepfuse.scripts.benchmark.server_process import ServerProcess

PATH = "/v1/images/generations"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image of a mixture of adapters."""

    prompt: str
    weights: dict[str, float]
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)  # others of the HTTP API

    @property
    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "weights": self.weights, "seed": self.seed, **self.fields}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An image, and when it was asked for and there, in seconds since the beginning of the load."""

    arrival: float
    answered: float
    pixels: np.ndarray

    @property
    def latency(self) -> float:
        """From its arrival, so that waiting counts."""
        return self.answered - self.arrival


def random_requests(
    prompts: Sequence[str], names: Sequence[str], count: int, *, seed: int, fields: dict[str, Any]
) -> list[Request]:
    """Requests of different mixtures, which are uniform on the simplex, and of different seeds."""
    random = np.random.default_rng(seed)
    return [
        Request(
            prompt=prompts[index % len(prompts)],
            weights=dict(zip(names, random.dirichlet([1.0] * len(names)).tolist(), strict=True)),
            seed=index,
            fields=fields,
        )
        for index in range(count)
    ]


def poisson_arrivals(count: int, rate: float, *, seed: int) -> list[float]:
    """Times of a Poisson process, in seconds; the first is 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(time) for time in np.cumsum(gaps) - gaps[0]]


def await_arrival(begin: float, arrival: float) -> None:
    time.sleep(max(0.0, begin + arrival - time.perf_counter()))


def draw(server: ServerProcess, request: Request) -> np.ndarray:
    """The image of one request.

    Raises:
        RuntimeError: where the server answers with an error.
    """
    status, body = server.ask("POST", PATH, request.body)
    if status != 200:
        raise RuntimeError(f"the server answered with status {status}: {body.decode(errors='replace')[:500]}")
    (picture,) = json.loads(body)["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).convert("RGB"))


def send_in_turn(server: ServerProcess, requests: Sequence[Request], arrivals: Sequence[float]) -> list[Answer]:
    """Send each request once it has arrived and those before it are answered."""
    begin, answers = time.perf_counter(), []
    for request, arrival in zip(requests, arrivals, strict=True):
        await_arrival(begin, arrival)
        pixels = draw(server, request)
        answers.append(Answer(arrival=arrival, answered=time.perf_counter() - begin, pixels=pixels))
    return answers


def send_at_arrival(server: ServerProcess, requests: Sequence[Request], arrivals: Sequence[float]) -> list[Answer]:
    """Send each request when it arrives, from a thread of its own."""
    begin = time.perf_counter()
    answers: dict[int, Answer] = {}
    faults: list[BaseException] = []

    def send(index: int) -> None:
        await_arrival(begin, arrivals[index])
        try:
            pixels = draw(server, requests[index])
        except Exception as error:  # raised in the thread that waits for all
            faults.append(error)
            return
        answers[index] = Answer(arrival=arrivals[index], answered=time.perf_counter() - begin, pixels=pixels)

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return [answers[index] for index in range(len(requests))]
