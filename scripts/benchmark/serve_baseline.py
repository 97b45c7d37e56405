"""diffusers' pipeline with the LoRAs of a set, which serves one request after the other by `set_adapters`.

It runs in a process of its own. There is no HTTP, and images are not encoded, which is in its favour.
"""

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.backbones.loading import load_base, quiet_libraries
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.layers import several_adapters
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.scripts.benchmark.serve_load import Answer, Request, await_arrival
from stepfuse.scripts.benchmark.serve_settings import ServeBenchmark


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A pipeline with the adapters of a set."""

    pipeline: Any
    loaded: AdapterSet
    steps: int

    def draw(self, request: Request) -> np.ndarray:
        """The image of a request, 8 bits a channel."""
        total = sum(request.weights.values())
        weights = {name: weight / total for name, weight in request.weights.items()}
        self.pipeline.set_adapters(list(weights), list(weights.values()))
        guided = self.loaded.guidance != "off"
        options = {"eta": eta_of(self.loaded, weights)}
        accepted = inspect.signature(self.pipeline.__call__).parameters
        answer = self.pipeline(
            request.prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.loaded.guidance_scale if guided else 1.0,
            generator=numbered_generator(request.seed, 0),
            output_type="np",
            **{name: value for name, value in options.items() if name in accepted},
        )
        return np.round(255 * answer.images[0]).astype(np.uint8)


def eta_of(loaded: AdapterSet, weights: dict[str, float]) -> float:
    """DDIM's eta with the variance of the soup, Σ w_i eta_i²; 1 where the set has schedules of other kinds."""
    described = {o.name: schedule_to_dict(o.variance) for o in loaded.objectives}
    if any(each["kind"] != "eta" for each in described.values()):
        return 1.0
    etas = {name: each["eta"] for name, each in described.items()}
    return math.sqrt(sum(weight * etas[name] ** 2 for name, weight in weights.items()))


def load_baseline(settings: ServeBenchmark) -> Baseline:
    quiet_libraries()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loaded = load_set(settings.model)
    pipeline = load_base(loaded.base, dtype=getattr(torch, settings.dtype)).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    backbone = backbone_of(pipeline)
    pipeline.scheduler = backbone.path(backbone.shape()).scheduler  # DDIM's, whatever the base has
    with several_adapters():
        for adapter in loaded.adapters:
            pipeline.load_lora_weights(str(adapter.folder), weight_name=WEIGHTS, adapter_name=adapter.name)
    return Baseline(pipeline=pipeline, loaded=loaded, steps=settings.steps or loaded.num_inference_steps)


_loaded: dict[ServeBenchmark, Baseline] = {}  # in the process that serves


def warm_up(settings: ServeBenchmark, requests: Sequence[Request]) -> float:
    """Load, draw two images, and return the median of seconds that an image takes after them."""
    baseline = _loaded[settings] = load_baseline(settings)
    seconds = []
    for request in [*requests[:2], *requests]:
        begin = time.perf_counter()
        baseline.draw(request)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[2:]))


def serve_in_turn(settings: ServeBenchmark, requests: Sequence[Request], arrivals: Sequence[float]) -> list[Answer]:
    """Draw each request once it has arrived and those before it are drawn."""
    begin, answers = time.perf_counter(), []
    for request, arrival in zip(requests, arrivals, strict=True):
        await_arrival(begin, arrival)
        pixels = _loaded[settings].draw(request)
        answers.append(Answer(arrival=arrival, answered=time.perf_counter() - begin, pixels=pixels))
    return answers
