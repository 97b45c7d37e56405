"""Forwards on the pretended device: what they need of the host goes there without a wait, and routes once."""

from tests.pretended.device import counted, install

install()

from dataclasses import replace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from stepfuse.fuse.backbones.guidance import Guidance  # noqa: E402
from stepfuse.fuse.backbones.loading import load_pipeline  # noqa: E402
from stepfuse.fuse.lora.batched import BatchedAdapters  # noqa: E402
from stepfuse.fuse.lora.mixture import BASE, Network  # noqa: E402
from stepfuse.fuse.lora.rows import AdapterRows  # noqa: E402
from stepfuse.train.lora import SharedForward  # noqa: E402
from tests.fixtures_tiny import (  # noqa: E402
    LATENT,
    add_random_lora,
    ddim,
    denoiser_of,
    networks,
    prompt_embeds,
    save_stable_diffusion,
)

CUDA = torch.device("cuda", 0)
MIXTURE = {"a": 0.7, "b": 0.3}
ASKED = {  # networks, and the rows of each
    "experts": (networks("a", "b"), None),
    "base and experts": (networks("a", None, "b"), None),
    "rows": (networks("a", None, "b"), [torch.tensor([2, 0]), None, torch.tensor([1])]),
    "a soup, merged once": ([Network.merged(MIXTURE, cacheable=True)], None),
    "soups": ([Network.merged(MIXTURE), Network.merged({"b": 1.2})], [torch.tensor([0, 2]), torch.tensor([1])]),
    "averaged factors": ([Network.merged(MIXTURE, "factors")], None),
    "an expert beside a soup": ([*networks("a"), Network.merged(MIXTURE)], [torch.tensor([1]), torch.tensor([0, 2])]),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = load_pipeline(str(save_stable_diffusion(tmp_path_factory.mktemp("base"))))
    for seed, name in enumerate("ab"):
        add_random_lora(pipeline, name, rank=2, alpha=None, seed=seed)
    return pipeline.to(CUDA)


@pytest.fixture(scope="module", params=["batched", "fixed", "separate", "batch_invariant"])
def denoiser(pipeline, request):
    batched = None if request.param == "separate" else BatchedAdapters(pipeline.unet, ["a", "b"])
    if batched and request.param != "batched":
        batched.fix(8, CUDA)
    own = dict(rows_at_once=4, batch_invariant=True) if request.param == "batch_invariant" else {}
    return denoiser_of(pipeline.unet, ddim(), guidance="off", batched=batched, **own)


def conditioning():
    states = torch.randn(2, 3, 7, 32, generator=torch.Generator().manual_seed(0)).to(CUDA)
    return prompt_embeds(states[0], states[1])


@pytest.mark.parametrize("source", ["shared", "full", "off"])
@pytest.mark.parametrize("asked", ASKED)
@torch.no_grad()
def test_no_forward_makes_the_host_wait(denoiser, asked, source):
    chosen = replace(denoiser, guidance=Guidance(source=source, scale=3.0))
    x_t, given = torch.ones(3, *LATENT, device=CUDA), conditioning()
    for t in (500, torch.tensor([400])):
        with counted() as syncs:
            chosen.predictions(x_t, t, given, *ASKED[asked])
        assert not syncs.kinds, syncs.lines
    with counted() as syncs:  # one time a row, as in training on images
        chosen.predictions(x_t, torch.tensor([300, 200, 100]), given, *ASKED[asked])
    assert not syncs.kinds, syncs.lines


def test_routes_in_training_make_nobody_wait(pipeline):
    rows, shared = AdapterRows(pipeline.unet, ["a", "b"]), SharedForward(pipeline.unet, "a")
    mixed = [BASE, *networks("a"), Network.merged(MIXTURE)]
    with counted() as syncs:
        first, again = (rows.route_of(mixed, CUDA) for _ in range(2))
        assert shared.route_of([BASE, *networks("a")], CUDA) == 1
    assert not syncs.kinds, syncs.lines
    assert first is again
    assert first.device == CUDA
    torch.testing.assert_close(first.cpu(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.7, 0.3]]))
