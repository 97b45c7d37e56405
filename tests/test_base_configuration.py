"""What a base's configuration says is heeded as diffusers' pipelines heed it, or refused by name when it is loaded."""

import inspect
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.backbones.unet_checks import UNET_EXPECTED, UNET_HANDLED
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.conditioning import Embeddings
from tests.fixtures_tiny import (
    BETAS,
    ddim,
    generators,
    refused,
    save_adapter,
    save_stable_diffusion,
    save_stable_diffusion_xl,
)

PROMPTS = ["a red apple on a blue background", "a fox"]
STATISTICS = dict(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[0.7, 1.5, 2.0, 0.4], scaling_factor=0.5)


def draw_both(tmp_path, base, *, negative_prompt=None, height=None, width=None):
    """Pixels of diffusers' pipeline with one adapter, and ours of a set of it."""
    save_adapter(tmp_path / "a", base, "a", alpha=4, variance=EtaSchedule(eta=0.7), guidance="full")
    adapter_set = create_set(tmp_path / "set", [tmp_path / "a"])
    pipe = FusedPipeline.from_pretrained(adapter_set)
    pipe.set_progress_bar_config(disable=True)
    options = dict(negative_prompt=negative_prompt, height=height, width=width, output_type="pt")
    got = pipe(PROMPTS, generator=generators(0, 1), **options).images
    plain = pipe.sampler.pipeline
    plain.set_progress_bar_config(disable=True)
    plain.unet.set_adapter("a")
    options |= dict(num_inference_steps=3, eta=0.7, guidance_scale=3.0)
    return plain(PROMPTS, generator=generators(0, 1), **options).images, got


def assert_near(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# Negative prompts


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return save_stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("negative", [None, ["", ""], ["a dog", ""]], ids=["none", "empty", "given"])
def test_xl_draws_what_diffusers_draws_with_and_without_a_negative_prompt(xl, tmp_path, negative):
    expected, got = draw_both(tmp_path, xl, negative_prompt=negative)
    assert_near(got, expected)


def test_xl_whose_pipeline_forces_no_zeros_embeds_an_empty_text(tmp_path):
    base = save_stable_diffusion_xl(tmp_path / "base", force_zeros_for_empty_prompt=False)
    expected, got = draw_both(tmp_path, base)
    assert_near(got, expected)
    pipeline = load_pipeline(str(base))
    encode = backbone_of(pipeline).encode
    none, empty = (encode(PROMPTS, negatives).negative["prompt_embeds"] for negatives in (None, ["", ""]))
    assert torch.equal(none, empty)


def test_a_list_may_have_negative_prompts_for_some(xl, sd):
    """Each row is what its negative prompt gives alone."""
    for folder in (xl, sd):
        pipeline = load_pipeline(str(folder))
        mixed = backbone_of(pipeline).encode(["a fox"] * 3, [None, "", "a dog"])
        for row, negative in enumerate([None, "", "a dog"]):
            alone = backbone_of(pipeline).encode(["a fox"], [negative])
            for name, value in alone.negative.items():
                assert_near(mixed.negative[name][row], value[0], 1e-6)
        assert bool(mixed.negative["prompt_embeds"][0].any()) == (folder == sd)


def test_training_takes_the_negative_embeddings_of_sampling(xl, sd):
    for folder in (xl, sd):
        pipeline = load_pipeline(str(folder))
        given = Embeddings(backbone_of(pipeline), torch.device("cpu"))(PROMPTS)
        expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, True) if folder == sd else pipeline.encode_prompt(PROMPTS)
        assert_near(given.negative["prompt_embeds"], expected[1], 1e-6)


# The autoencoder


def test_latent_statistics_are_heeded_in_decoding_as_diffusers_does(tmp_path):
    base = save_stable_diffusion_xl(tmp_path / "base", vae=STATISTICS)
    expected, got = draw_both(tmp_path, base)
    assert expected.std() > 0.01
    assert_near(got, expected)


@pytest.mark.parametrize("vae", [STATISTICS, {"scaling_factor": 0.13}], ids=["statistics", "scale"])
def test_encoding_is_the_inverse_of_what_decoding_does_to_latents(tmp_path, vae):
    """latents = (z - mean) · scaling_factor / std of the autoencoder's own sample z."""
    pipeline = load_pipeline(str(save_stable_diffusion_xl(tmp_path, vae=vae)))
    pixels = torch.rand(2, 3, 16, 16, generator=generators(0)[0])
    latents = backbone_of(pipeline).encode_pixels(pixels, generators(1, 2))
    with torch.no_grad():
        z = pipeline.vae.encode(pixels * 2 - 1).latent_dist.sample(generators(1, 2))
        plain = (pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        assert_near(backbone_of(pipeline).decode(latents), plain)
    mean, std = (
        torch.tensor(vae.get(key, [value] * 4)) for key, value in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    assert_near(latents, (z - mean.view(1, 4, 1, 1)) * vae["scaling_factor"] / std.view(1, 4, 1, 1))


def test_an_autoencoder_that_overflows_is_upcast_for_encoding_too(tmp_path):
    pipeline = load_pipeline(str(save_stable_diffusion_xl(tmp_path, vae={"force_upcast": True})), dtype=torch.float16)
    latents = backbone_of(pipeline).encode_pixels(torch.rand(1, 3, 16, 16), generators(0))
    assert pipeline.vae.dtype == torch.float32
    assert latents.dtype == torch.float32


@pytest.mark.parametrize(
    ("save", "vae", "culprit"),
    [
        (save_stable_diffusion, STATISTICS, "latents_mean"),
        (save_stable_diffusion_xl, {"latents_mean": [0.0] * 4}, "latents_std"),
        (save_stable_diffusion_xl, STATISTICS | {"latents_std": [1.0] * 3}, "latents_std"),
        (save_stable_diffusion_xl, {"shift_factor": 0.1}, "shift_factor 0.1"),
        (save_stable_diffusion, {"scaling_factor": 0.0}, "scaling_factor"),
        (save_stable_diffusion, {"latent_channels": 8}, "in_channels 4"),
        (save_stable_diffusion, {"in_channels": 4}, "in_channels 4"),
    ],
)
def test_other_latent_statistics_are_refused(tmp_path, save, vae, culprit):
    with refused(culprit, str(tmp_path)):
        load_pipeline(str(save(tmp_path, vae=vae)))


# The network


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (dict(time_cond_proj_dim=8), "time_cond_proj_dim 8"),
        (dict(in_channels=9), "in_channels 9"),
        (dict(in_channels=8), "in_channels 8"),
        (dict(out_channels=8), "out_channels 8"),
        (dict(num_class_embeds=4), "num_class_embeds 4"),
        (dict(class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (dict(encoder_hid_dim=16, encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type 'image_proj'"),
        (dict(cross_attention_dim=48), "cross_attention_dim 48"),
        (dict(attention_type="gated"), "attention_type 'gated'"),
        (
            dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72),
            "addition_embed_type 'text_time'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_network_that_needs_more_than_the_pipeline_gives_is_refused(tmp_path, config, culprit):
    with refused(culprit, str(tmp_path)):
        load_pipeline(str(save_stable_diffusion(tmp_path, unet=config)))


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (dict(addition_embed_type=None), "addition_embed_type None"),
        (dict(projection_class_embeddings_input_dim=64), "projection_class_embeddings_input_dim 64"),
        (dict(time_cond_proj_dim=8), "time_cond_proj_dim 8"),
        (dict(in_channels=9), "in_channels 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_network_of_xl_that_needs_more_is_refused(tmp_path, config, culprit):
    with refused(culprit, str(tmp_path)):
        load_pipeline(str(save_stable_diffusion_xl(tmp_path, unet=config)))


@pytest.mark.parametrize(
    "config",
    [
        dict(layers_per_block=[1, 2], transformer_layers_per_block=[1, 2]),
        dict(sample_size=[8, 12]),
        dict(addition_embed_type="text", addition_embed_type_num_heads=4),
        dict(encoder_hid_dim=32, encoder_hid_dim_type="text_proj", cross_attention_dim=24),
        dict(center_input_sample=True, time_embedding_act_fn="silu", resnet_time_scale_shift="scale_shift"),
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_the_network_computes_by_itself_is_drawn_as_in_diffusers(tmp_path, config):
    base = save_stable_diffusion(tmp_path / "base", unet=config)
    expected, got = draw_both(tmp_path, base)
    assert got.shape == expected.shape
    assert_near(got, expected)


def test_a_network_of_xl_with_lists_of_layers_is_drawn_as_in_diffusers(tmp_path):
    lists = dict(layers_per_block=[1, 2], transformer_layers_per_block=[1, 2])
    expected, got = draw_both(tmp_path, save_stable_diffusion_xl(tmp_path / "base", unet=lists))
    assert_near(got, expected)


def test_a_network_without_a_size_must_be_told_one(tmp_path):
    base = save_stable_diffusion(tmp_path / "base", unet=dict(sample_size=None))
    save_adapter(tmp_path / "a", base, "a")
    sampler = FusedSampler.from_pretrained(create_set(tmp_path / "set", [tmp_path / "a"]))
    with refused("sample_size None", "height"):
        sampler.sample("a fox", progress=False)
    assert sampler.sample("a fox", height=16, width=24, output_type="pt", progress=False).shape == (1, 3, 16, 24)


def test_every_key_of_the_network_is_known():
    """A key that a new diffusers adds is refused unless it has its default; here it is to be decided upon."""
    keys = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    assert keys == UNET_HANDLED | UNET_EXPECTED.keys() | {"addition_embed_type"}


def test_keys_that_diffusers_ignores_are_ignored(tmp_path):
    """UNets that were saved by an exponential moving average have some."""
    save_stable_diffusion(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decay": 0.9999, "update_after_step": 0}))
    load_pipeline(str(tmp_path))


def test_a_pipeline_that_is_loaded_already_is_checked_too(tmp_path, sd):
    save_adapter(tmp_path / "a", sd, "a")
    adapter_set = create_set(tmp_path / "set", [tmp_path / "a"])
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter leaves it
    with refused("encoder_hid_dim_type 'ip_image_proj'", "unload_ip_adapter"):
        FusedPipeline.from_pretrained(adapter_set, pipeline=pipeline)


def test_texts_that_do_not_go_with_the_network_are_refused(sd, xl):
    pipeline = load_pipeline(str(sd))
    pipeline.tokenizer.model_max_length = 77
    with refused("model_max_length 77", "16"):
        backbone_of(pipeline).check()
    pipeline.tokenizer = None
    with refused("no tokenizer"):
        backbone_of(pipeline).check()
    pipeline.text_encoder = None
    backbone_of(pipeline).check()
    with refused("no tokenizer", "prompt_embeds"):
        backbone_of(pipeline).encode(["a fox"])
    pipeline = load_pipeline(str(xl))
    pipeline.text_encoder_2 = pipeline.text_encoder
    with refused("text_encoder_2", "CLIPTextModelWithProjection"):
        backbone_of(pipeline).check()


def test_xl_with_its_second_text_encoder_alone_is_drawn_as_in_diffusers(tmp_path):
    """As its refiner has it."""
    base = save_stable_diffusion_xl(tmp_path / "base", unet=dict(cross_attention_dim=32))
    whole = StableDiffusionXLPipeline.from_pretrained(base)
    parts = whole.components | {"text_encoder": None, "tokenizer": None}
    StableDiffusionXLPipeline(**parts).save_pretrained(tmp_path / "second")
    expected, got = draw_both(tmp_path, tmp_path / "second")
    assert_near(got, expected)


# The scheduler


@pytest.mark.parametrize(
    ("scheduler", "culprit"),
    [
        (ddim(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
        (EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
        (DDPMScheduler(**BETAS, clip_sample=False, rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
        (ddim(trained_betas=[0.1] * 10), "10 trained_betas"),
        (ddim(thresholding=True), "thresholding True"),
        (EulerDiscreteScheduler(**BETAS, timestep_type="continuous", sigma_min=0.1, sigma_max=2.0), "timestep_type"),
        (DPMSolverMultistepScheduler(**BETAS, use_flow_sigmas=True), "use_flow_sigmas True"),
        (DPMSolverMultistepScheduler(**BETAS, prediction_type="flow_prediction"), "flow_prediction"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas True"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_scheduler_whose_options_change_the_path_is_refused(scheduler, culprit):
    with refused(culprit):
        NoisePath.from_scheduler(scheduler)


def test_the_scheduler_is_checked_when_the_base_is_loaded(tmp_path):
    folder = save_stable_diffusion(tmp_path, scheduler=ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    with refused(str(tmp_path), "rescale_betas_zero_snr True", "v_prediction"):
        load_pipeline(str(folder))


@pytest.mark.parametrize(
    "scheduler",
    [
        ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        ddim(timestep_spacing="linspace", prediction_type="sample"),
        ddim(trained_betas=torch.linspace(1e-4, 0.03, 1000).tolist(), timestep_spacing="trailing"),
        ddim(beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True),
    ],
    ids=["zero-snr", "linspace", "trained-betas", "cosine"],
)
def test_options_of_ddim_are_heeded_as_in_diffusers(tmp_path, scheduler):
    expected, got = draw_both(tmp_path, save_stable_diffusion(tmp_path / "base", scheduler=scheduler))
    assert_near(got, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**BETAS | dict(beta_schedule="sigmoid"), clip_sample=False),
        DDPMScheduler(**BETAS | dict(beta_schedule="laplace"), clip_sample=False),
        DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, solver_order=3),
        EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(trained_betas=torch.linspace(1e-4, 0.03, 1000).tolist()),
    ],
    ids=["sigmoid", "laplace", "karras", "zero-snr", "trained-betas"],
)
def test_the_path_of_any_scheduler_is_its_own(scheduler):
    """alpha_t² is its ᾱ_t; Euler writes 2^-24 for the 0 of zero terminal SNR."""
    path = NoisePath.from_scheduler(scheduler)
    torch.testing.assert_close(path.alpha[:-1] ** 2, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)
    assert isinstance(path.scheduler, DDIMScheduler)
