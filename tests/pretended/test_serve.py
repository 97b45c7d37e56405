"""Forwards that runs share on the device: the latents of the CPU, and no waits between steps."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.sampling.shared_forwards import SharedForwards
from tests.fixtures_serve import drawn_together
from tests.pretended.waits import counted
from tests.pretended.worlds import RULES, draw, load_sampler


@pytest.fixture(scope="module")
def shared(world):
    """A sampler on the device, and the forwards that its runs share."""
    sampler = load_sampler(world, "cuda", forwards="separate")
    backbone = sampler.backbone
    adapters = BatchedAdapters(
        backbone.network, [*sampler.names, *(oracle.name for oracle in sampler.oracles)], backbone.unbatched
    )
    return sampler, SharedForwards(backbone, adapters, max_rows=8, exact=False)


CASES = [RULES[name] for name in ("product", "soup", "average_noise")]


def together(shared, steps, generators):
    """Latents of the cases, drawn at the same time, with generators of this kind of device."""
    sampler, forwards = shared

    def drawing(case):
        return lambda predict: draw(
            replace(sampler, denoiser=replace(sampler.denoiser, forward_fn=predict)), case, steps, generators
        )

    return drawn_together(forwards, [drawing(case) for case in CASES])


def test_runs_that_share_forwards_draw_on_the_device_what_each_draws_on_the_cpu(shared, samplers):
    for latents, case in zip(together(shared, 2, "cpu"), CASES, strict=True):
        assert latents.device.type == "cuda"
        torch.testing.assert_close(latents.cpu(), draw(samplers["cpu"], case, 2), rtol=0, atol=1e-5)


def test_a_step_of_shared_forwards_makes_the_host_wait_for_nothing(shared):
    def waits(steps):
        with counted() as found:
            together(shared, steps, "cuda")
        return Counter(found.elsewhere)  # the engine has a thread of its own

    waits(2)  # fills caches
    few, many = waits(2), waits(6)
    assert few  # of the last latents, which are checked
    assert many - few == Counter()
