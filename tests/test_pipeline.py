"""Loading bases, Stable Diffusion XL, and what tells one base from another."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

from stepfuse.data import emoji
from stepfuse.fuse.backbones.fingerprint import base_fingerprint, same_base
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.layers import active_adapter
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import (
    BETAS,
    LATENT,
    add_random_lora,
    ddim,
    generators,
    networks,
    refused,
    save_adapter,
    save_stable_diffusion,
    save_stable_diffusion_xl,
)

PROMPTS = ["a red apple on a blue background", "a fox"]
NEGATIVES = ["a dog on a red background", ""]
HALVES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return save_stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl_sampler(xl, tmp_path_factory):
    root = tmp_path_factory.mktemp("xl-adapters")
    for seed, (name, eta) in enumerate({"a": 0.4, "b": 0.8}.items()):
        save_adapter(root / name, xl, name, rank=2, alpha=4, seed=seed, variance=EtaSchedule(eta=eta))
    create_set(root / "set", [root / "a", root / "b"])
    return FusedSampler.from_pretrained(root / "set")


def separate(xl, adapter=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl)
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        pipeline.load_lora_weights(adapter)
    return pipeline


def noise(batch=2):
    return torch.randn((batch, *LATENT), generator=torch.Generator().manual_seed(0))


def assert_near(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))


# Loading.


@pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks` argument:UserWarning"
)  # diffusers', of huggingface_hub
def test_a_name_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), "stepfuse-tests/no-such-model"):
        with refused(name, "model_index.json", "emoji"):
            load_pipeline(name)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # as above
def test_a_relative_base_that_is_not_there_is_refused_with_the_folder_it_was_sought_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("'bases/mine'", str(tmp_path)):
        load_pipeline("bases/mine")


def test_a_pipeline_of_another_family_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    with refused(str(tmp_path), "DDPMPipeline", "StableDiffusionPipeline"):
        load_pipeline(str(tmp_path))


def test_the_base_is_frozen_and_in_the_dtype_asked_for(base):
    for dtype in HALVES:
        pipeline = load_pipeline(str(base), dtype=dtype)
        for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert not any(p.requires_grad for p in model.parameters())
            assert not model.training


def test_the_embedded_base_is_a_stable_diffusion_pipeline_of_64_pixels():
    pipeline = load_pipeline("emoji")
    assert type(pipeline) is StableDiffusionPipeline
    assert backbone_of(pipeline).size(None, None) == (64, 64)
    plain = StableDiffusionPipeline.from_pretrained(emoji.PIPELINE)
    assert NoisePath.from_scheduler(pipeline.scheduler).prediction_type == plain.scheduler.config.prediction_type
    assert same_base(base_fingerprint(pipeline.unet), base_fingerprint(plain.unet))


def test_sizes_are_multiples_of_what_the_levels_of_both_networks_halve(base):
    """One halving in the autoencoder and one in the UNet: multiples of 4 pixels."""
    pipeline = load_pipeline(str(base))
    assert backbone_of(pipeline).size(None, None) == (16, 16)
    assert backbone_of(pipeline).size(20, None) == (20, 16)
    for height, width, culprit in (
        (18, 16, "height is 18"),
        (16, 2, "width is 2"),
        (-4, 16, "height is -4"),
        (16, 0, "width is 0"),
    ):
        with refused(culprit, "multiple of 4"):
            backbone_of(pipeline).size(height, width)


def test_a_base_with_another_ddpm_scheduler_is_sampled_by_ddim_on_its_path(tmp_path):
    """Stable Diffusion 1.5 comes with PNDM."""
    pndm = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    folder = save_stable_diffusion(tmp_path / "base", scheduler=pndm)
    save_adapter(tmp_path / "a", folder, "a", variance=EtaSchedule(eta=0.5), guidance="full")
    create_set(tmp_path / "set", [tmp_path / "a"])
    sampler = FusedSampler.from_pretrained(tmp_path / "set")
    assert type(sampler.pipeline.scheduler) is PNDMScheduler
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.scheduler = ddim()
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path / "a")
    expected = plain(
        PROMPTS,
        num_inference_steps=3,
        eta=0.5,
        guidance_scale=3.0,
        generator=generators(0, 1),
        output_type="latent",
    ).images
    got = sampler.sample(PROMPTS, generator=generators(0, 1), output_type="latent", progress=False)
    assert_near(got, expected)


def test_a_base_whose_scheduler_has_alphas_serves_whatever_its_class(tmp_path):
    euler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    path = NoisePath.from_scheduler(load_pipeline(str(save_stable_diffusion(tmp_path, scheduler=euler))).scheduler)
    expected = NoisePath.from_scheduler(ddim(set_alpha_to_one=True))  # DDIM's default, for Euler has no such option
    assert torch.equal(path.alpha, expected.alpha)
    assert path.steps(4) == [(751, 501), (501, 251), (251, 1), (1, -1)]


# Stable Diffusion XL.


@pytest.mark.parametrize("size", [(None, None), (24, 16)])
def test_xl_is_told_what_its_own_pipeline_tells_it(xl, xl_sampler, size):
    """Both texts side by side, the second one's pooled, and original size, crop and target size."""
    pipeline = separate(xl)
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=NEGATIVES)
    height, width = (side or 16 for side in size)
    ids = torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=torch.float32)
    conditioning = xl_sampler.backbone.encode(PROMPTS, NEGATIVES, height=size[0], width=size[1])
    x_t, t = noise(), 501
    with torch.no_grad():
        got = xl_sampler.denoiser.predictions(x_t, t, conditioning, networks(None))[0]
        conditional = pipeline.unet(x_t, t, positive, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        unconditional = pipeline.unet(
            x_t, t, negative, added_cond_kwargs={"text_embeds": negative_pooled, "time_ids": ids}
        ).sample
    assert_near(got, unconditional + 3.0 * (conditional - unconditional))
    assert (conditional - unconditional).abs().mean() > 1e-2


def test_xl_with_one_adapter_draws_what_diffusers_draws_with_it(xl, tmp_path):
    save_adapter(tmp_path / "a", xl, "a", alpha=4, variance=EtaSchedule(eta=0.4), guidance="full")
    size = dict(height=24, width=16)
    expected = separate(xl, tmp_path / "a")(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=3,
        eta=0.4,
        guidance_scale=3.0,
        generator=generators(0, 1),
        output_type="latent",
        **size,
    ).images
    sampler = FusedSampler.from_pretrained(create_set(tmp_path / "set", [tmp_path / "a"]))
    got = sampler.sample(
        PROMPTS,
        negative_prompt=NEGATIVES,
        generator=generators(0, 1),
        output_type="latent",
        progress=False,
        **size,
    )
    assert_near(got, expected)


def test_a_fused_step_of_xl_is_the_precision_weighted_mean_of_ddim_steps(xl_sampler):
    """With weights 1/4 and 3/4 and etas 0.4 and 0.8, v_i = eta_i² v: shares 0.25/0.16 and 0.75/0.64."""
    scheduler = ddim()
    scheduler.set_timesteps(4)
    x_t = noise()
    conditioning = xl_sampler.backbone.encode(PROMPTS, NEGATIVES)
    with torch.no_grad():
        fused = xl_sampler.step(x_t, 1, xl_sampler.plan({"a": 1, "b": 3}, 2, num_inference_steps=4), conditioning)
        predictions = xl_sampler.denoiser.predictions(x_t, 501, conditioning, networks("a", "b"))
    still = torch.zeros_like(x_t)
    first, second = (
        scheduler.step(prediction, 501, x_t, eta=eta, variance_noise=still).prev_sample
        for prediction, eta in zip(predictions, (0.4, 0.8), strict=True)
    )
    shares = (0.25 / 0.16, 0.75 / 0.64)
    assert_near(fused.mean, (shares[0] * first + shares[1] * second) / sum(shares))
    ancestral = float(scheduler._get_variance(501, 251))
    assert fused.variance.flatten().tolist() == pytest.approx([ancestral / sum(shares)] * 2, rel=1e-5)


# Telling bases apart.


def test_a_base_is_one_in_every_precision(base):
    prints = [base_fingerprint(load_pipeline(str(base), dtype=dtype).unet) for dtype in HALVES]
    for first in prints:
        assert all(same_base(first, second) for second in prints)


def test_a_base_with_adapters_on_it_is_still_itself(base):
    pipeline = load_pipeline(str(base))
    before = base_fingerprint(pipeline.unet)
    add_random_lora(pipeline, "a", rank=2, alpha=2, seed=0)
    assert base_fingerprint(pipeline.unet) == before


def test_other_weights_and_other_architectures_are_other_bases(base, xl, tmp_path):
    others = [
        save_stable_diffusion(tmp_path / "seed", seed=1),
        save_stable_diffusion(tmp_path / "wider", channels=(16, 48)),
        xl,
    ]
    for dtype in HALVES:
        ours = base_fingerprint(load_pipeline(str(base), dtype=dtype).unet)
        for other in others:
            theirs = base_fingerprint(load_pipeline(str(other)).unet)
            assert not same_base(ours, theirs)
            assert not same_base(theirs, ours)


# Switching adapters.


def state_of(unet):
    layers = [module for module in unet.modules() if hasattr(module, "lora_A")]
    return [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers], {
        name: parameter.requires_grad for name, parameter in unet.named_parameters()
    }


def test_switching_adapters_restores_what_was_active_and_what_is_trained(base):
    pipeline = load_pipeline(str(base))
    unet = pipeline.unet
    add_random_lora(pipeline, "a", rank=2, alpha=2, seed=0)
    before = state_of(unet)
    assert {name for name, trained in before[1].items() if trained} == {
        name for name, _ in unet.named_parameters() if ".lora_" in name
    }
    embeddings = backbone_of(pipeline).encode(PROMPTS, NEGATIVES).positive["prompt_embeds"]

    def predict():
        with torch.no_grad():
            return unet(noise(), 501, embeddings).sample

    with_adapter = predict()
    plain = load_pipeline(str(base)).unet
    with torch.no_grad():
        without = plain(noise(), 501, embeddings).sample
    with active_adapter(unet, None):
        assert torch.equal(predict(), without)
        with active_adapter(unet, "a"):
            assert torch.equal(predict(), with_adapter)
        assert torch.equal(predict(), without)
        assert state_of(unet)[1] == before[1]
    assert state_of(unet) == before
    assert torch.equal(predict(), with_adapter)
    assert not torch.equal(with_adapter, without)

    class Stopped(Exception):
        pass

    with pytest.raises(Stopped), active_adapter(unet, None):
        raise Stopped
    assert state_of(unet) == before


def test_an_adapter_the_unet_lacks_is_refused(base):
    pipeline = load_pipeline(str(base))
    with refused("'a'"), active_adapter(pipeline.unet, "a"):
        pass
    add_random_lora(pipeline, "a", rank=2, alpha=2, seed=0)
    before = state_of(pipeline.unet)
    with refused("'b'"), active_adapter(pipeline.unet, "b"):
        pass
    assert state_of(pipeline.unet) == before
