"""Every model family on the device: the product draws what it draws on the CPU, with the waits of the budget."""

import pytest
import torch

from stepfuse.fuse.backbones.registry import BACKBONES
from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.fixtures_families import FAMILIES as FLOWS
from tests.pretended.budget import check_budget, family_name, of_family
from tests.pretended.families import FAMILIES, draw_family, save_family_set

DERIVED = {"Flux2Pipeline"}  # its text encoder is Klein's, its network that of `flux2`


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, save_family_set(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family_is_among_them():
    tiny = {type(flow.make()).__name__ for flow in FLOWS.values()}
    assert tiny | {"StableDiffusionPipeline", "StableDiffusionXLPipeline"} | DERIVED == set(BACKBONES)


def test_a_family_draws_on_the_device_what_it_draws_on_the_cpu_and_waits_as_often_as_the_budget_says(family):
    name, saved = family
    host, device = (FusedSampler.from_pretrained(saved.folder, device=each) for each in ("cpu", "cuda"))
    expected, drawn = (draw_family(sampler, saved, 2, "pt") for sampler in (host, device))
    assert drawn.device.type == "cpu"
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    check_budget(family_name(name), of_family(device, saved))
