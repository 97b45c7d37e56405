"""What a server does under load: requests that share forwards, beside the same requests one after the other."""

import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stepfuse.scripts.benchmark import harness, serve_baseline
from stepfuse.scripts.benchmark.harness import cell
from stepfuse.scripts.benchmark.memory import Report
from stepfuse.scripts.benchmark.serve_load import (
    Answer,
    Request,
    poisson_arrivals,
    random_requests,
    send_at_arrival,
    send_in_turn,
)
from stepfuse.scripts.benchmark.serve_settings import ServeBenchmark
from stepfuse.scripts.benchmark.server_process import ServerProcess, server_process

CONCURRENT, IN_TURN, BASELINE = "stepfuse serve", "stepfuse serve, one at a time", "set_adapters"
HEAVY = 4.0  # times what the baseline can serve, by default
Serve = Callable[[Sequence[Request], Sequence[float]], list[Answer]]


def benchmark_serve(settings: ServeBenchmark, *, report: Report = lambda results: None) -> dict[str, Any]:
    """Serve the same requests by all methods in alternation, under heavy and light load.

    Raises:
        ValueError: where the server does not start.
        RuntimeError: where it answers with an error.
    """
    device = torch.device(settings.device)
    options = ["--device", settings.device, "--dtype", settings.dtype, "--max_rows", str(settings.max_rows)]
    options += ["--max_queue", str(max(128, settings.requests))]
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with (
        harness.cpu_threads(settings.threads),
        ProcessPoolExecutor(1, mp_context=spawn) as other,
        server_process([settings.model], options, threads=settings.threads) as server,
    ):
        requests = _requests(server, settings)
        alone = other.submit(serve_baseline.warm_up, settings, requests).result()
        send_at_arrival(server, requests, [0.0] * len(requests))
        rates = {"heavy": settings.rate or HEAVY / alone, "light": settings.light / alone}
        methods: dict[str, Serve] = {
            CONCURRENT: partial(send_at_arrival, server),
            IN_TURN: partial(send_in_turn, server),
            BASELINE: lambda given, times: other.submit(serve_baseline.serve_in_turn, settings, given, times).result(),
        }
        measured: dict[tuple[str, str], list[list[Answer]]] = {(load, name): [] for load in rates for name in methods}
        with tqdm(total=settings.repeats * len(measured), desc="load") as bar:
            for turn in range(settings.repeats):
                for load, rate in rates.items():
                    arrivals = poisson_arrivals(settings.requests, rate, seed=settings.seed + turn)
                    for name, serve in methods.items():
                        bar.set_postfix_str(f"{name}, {load} load")
                        measured[load, name].append(serve(requests, arrivals))
                        bar.update()
        if (status := server.stop()) != 0:
            raise RuntimeError(f"the server ended with exit status {status}")
        results = harness.context(device) | {
            "settings": asdict(settings),
            "rule": settings.rule,
            "seconds_an_image_of_set_adapters": alone,
            "requests_a_second": rates,
            "rows": [_entry(load, name, measured) for load, name in measured],
            "images": _compared(measured),
        }
    report(results)
    return results


def _requests(server: ServerProcess, settings: ServeBenchmark) -> list[Request]:
    (served,) = json.loads(server.ask("GET", "/v1/sets")[1])["sets"]
    fields: dict[str, Any] = {"rule": settings.rule} | ({"steps": settings.steps} if settings.steps else {})
    names = [each["name"] for each in served["objectives"]]
    return random_requests(served["prompts"], names, settings.requests, seed=settings.seed, fields=fields)


def _entry(load: str, name: str, measured: Mapping[tuple[str, str], list[list[Answer]]]) -> dict[str, Any]:
    """A method under a load: medians over the rounds, and ratios to the baseline of the same round."""
    rounds, baseline = measured[load, name], measured[load, BASELINE]
    throughput = harness.ratios([*map(images_a_second, rounds)], [*map(images_a_second, baseline)])
    late, late_of_baseline = ([percentile(each, 95) for each in some] for some in (rounds, baseline))
    return {
        "load": load,
        "way": name,
        "images_a_second": statistics.median(map(images_a_second, rounds)),
        "p50_seconds": statistics.median(percentile(each, 50) for each in rounds),
        "p95_seconds": statistics.median(late),
        "throughput_ratio": throughput["ratio"],
        "throughput_ratio_range": [throughput["ratio_min"], throughput["ratio_max"]],
        "p95_ratio": harness.ratios(late, late_of_baseline)["ratio"],
        "latencies": [[round(answer.latency, 4) for answer in each] for each in rounds],
    }


def images_a_second(answers: Sequence[Answer]) -> float:
    """Images by the time from the first arrival to the last answer."""
    first, last = min(each.arrival for each in answers), max(each.answered for each in answers)
    return len(answers) / (last - first)


def percentile(answers: Sequence[Answer], percent: float) -> float:
    """Of the latencies, linear between two of them."""
    return float(np.percentile([each.latency for each in answers], percent))


def _compared(measured: Mapping[tuple[str, str], list[list[Answer]]]) -> dict[str, Any]:
    """How many images of the server are the same bits in company as alone, and how far those of the baseline are."""
    alone = [answer.pixels for answer in measured["heavy", IN_TURN][0]]

    def images(*names: str) -> list[tuple[np.ndarray, np.ndarray]]:
        rounds = [each for (_, name), some in measured.items() if name in names for each in some]
        return [(one, other.pixels) for each in rounds for one, other in zip(alone, each, strict=True)]

    company = images(CONCURRENT, IN_TURN)
    distances = [np.abs(one.astype(int) - other) for one, other in images(BASELINE)]
    return {
        "drawn_by_the_server": len(company),
        "equal_to_the_first_drawn_alone": sum(np.array_equal(one, other) for one, other in company),
        "largest_difference_to_set_adapters": int(max(each.max() for each in distances)),
        "mean_difference_to_set_adapters": float(np.mean([each.mean() for each in distances])),
    }


def serve_table(results: dict[str, Any]) -> str:
    columns: harness.Columns = [
        ("load", cell("load")),
        ("method", cell("way")),
        ("images a second", cell("images_a_second", ".2f")),
        ("÷ set_adapters", cell("throughput_ratio", ".2f")),
        ("range", lambda entry: "–".join(f"{each:.2f}" for each in entry["throughput_ratio_range"])),
        ("p50, s", cell("p50_seconds", ".2f")),
        ("p95, s", cell("p95_seconds", ".2f")),
        ("p95 ÷ set_adapters", cell("p95_ratio", ".2f")),
    ]
    rates, images = results["requests_a_second"], results["images"]
    lines = [
        harness.results_table(columns, results),
        "",
        f"Requests a second: {rates['heavy']:.2f} under heavy load, {rates['light']:.2f} under light load. "
        f"{images['equal_to_the_first_drawn_alone']} of {images['drawn_by_the_server']} images of the server have the "
        f"bits of the image generated alone; those of set_adapters differ by at most "
        f"{images['largest_difference_to_set_adapters']} of 255.",
    ]
    return "\n".join(lines)
