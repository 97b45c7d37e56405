"""FLUX.1 and FLUX.2: packing, guidance of each model, the shift of each, and latents ↔ pixels."""

import math

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.flux2 import EmpiricalShift
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.mixture import BASE
from tests.fixtures_families_flux import (
    HEIGHT,
    PROMPTS,
    SCALE,
    STEPS,
    T5_TOKENS,
    WIDTH,
    denoiser_of,
    drawn,
    flux2_dev,
    flux2_klein,
    flux_dev,
    flux_schnell,
    normalised,
    unpacked,
    untokened,
)
from tests.fixtures_tiny import generators


class Echo(nn.Module):
    """Gives back the tokens it is given."""

    def forward(self, **given):
        self.given = given
        return (given["hidden_states"],)


# Packing


@pytest.fixture
def x():
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def test_tokens_and_their_positions_are_those_of_flux_1(x):
    backbone, echo = backbone_of(drawn(flux_dev)), Echo()
    inputs = {"prompt_embeds": torch.zeros(2, 5, 16), "pooled_prompt_embeds": torch.zeros(2, 32)}
    assert torch.equal(backbone.predict(x, torch.tensor([250.0, 500.0]), inputs, network=echo), x)
    packed = FluxPipeline._pack_latents(x, 2, 4, 8, 12)
    assert torch.equal(echo.given["hidden_states"], packed)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, x.device, x.dtype)
    assert torch.equal(echo.given["img_ids"], ids)
    assert torch.equal(echo.given["txt_ids"], torch.zeros(5, 3))
    assert echo.given["timestep"].tolist() == [0.25, 0.5]


def test_tokens_and_their_positions_are_those_of_flux_2(x):
    echo, patches = Echo(), Flux2KleinPipeline._patchify_latents(x)
    inputs = {"prompt_embeds": torch.zeros(2, 5, 24)}
    found = backbone_of(drawn(flux2_klein)).predict(patches, torch.ones(2), inputs, network=echo)
    assert torch.equal(found, patches)
    assert torch.equal(echo.given["hidden_states"], Flux2KleinPipeline._pack_latents(patches))
    assert torch.equal(echo.given["img_ids"], Flux2KleinPipeline._prepare_latent_ids(patches)[0])
    assert torch.equal(echo.given["txt_ids"], Flux2KleinPipeline._prepare_text_ids(inputs["prompt_embeds"])[0])


def test_packing_is_a_permutation_which_log_probs_and_kl_do_not_see(x):
    def packed(z):
        return FluxPipeline._pack_latents(z, 2, 4, 8, 12)[:, None]

    mean, other, variance = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(1)).double()
    variance = variance.exp()
    plain = Gaussian(mean=mean, variance=variance)
    tokens = Gaussian(mean=packed(mean), variance=packed(variance))
    torch.testing.assert_close(plain.log_prob(x), tokens.log_prob(packed(x)))
    reference = Gaussian(mean=other, variance=variance)
    of_tokens = Gaussian(mean=packed(other), variance=packed(variance))
    torch.testing.assert_close(plain.kl(reference), tokens.kl(of_tokens))


# Guidance of each model, on images that are not square


NEGATIVE = {"true_cfg_scale": SCALE, "negative_prompt": ["", ""]}
LATENTS = {flux_dev: unpacked, flux_schnell: unpacked, flux2_dev: untokened, flux2_klein: normalised}
CASES = {
    "dev embeds it": (flux_dev, "embedded", {"guidance_scale": SCALE}, {}),
    "dev is guided by a negative prompt, told 1": (flux_dev, "full", NEGATIVE | {"guidance_scale": 1.0}, {}),
    "dev without any is told 1": (flux_dev, "off", {"guidance_scale": 1.0}, {}),
    "schnell has none": (flux_schnell, "off", {}, {}),
    "schnell is guided by a negative prompt": (flux_schnell, "full", NEGATIVE, {}),
    "FLUX.2 dev embeds it": (flux2_dev, "embedded", {"guidance_scale": SCALE}, {}),
    "Klein is guided by a negative prompt": (flux2_klein, "full", {"guidance_scale": SCALE}, {}),
    "distilled Klein has none": (flux2_klein, "off", {"guidance_scale": SCALE}, {"is_distilled": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_diffusers(case):
    make, guidance, call, config = CASES[case]
    pipeline = drawn(make, **config)
    expected = pipeline(
        prompt=PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=generators(0, 1),
        output_type="latent",
        max_sequence_length=pipeline.config[LENGTH],
        **call,
    ).images
    expected = LATENTS[make](pipeline, expected, HEIGHT, WIDTH)
    denoiser, shape = denoiser_of(pipeline, guidance)
    conditioning = denoiser.backbone.encode(PROMPTS)
    x = randn_tensor((2, *shape), generator=generators(0, 1))
    with torch.no_grad():
        for t, s in denoiser.path.steps(STEPS):
            (velocity,) = denoiser.predictions(x, t, conditioning, [BASE])
            x = x + (s - t) * velocity
    assert ((x - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize(
    ("make", "config", "guidance", "line"),
    [
        (flux_schnell, {}, "embedded", "FluxTransformer2DModel does not take .* expected one of shared, full, off"),
        (flux2_klein, {}, "embedded", "Flux2Transformer2DModel does not take .* expected one of shared, full, off"),
        (flux2_klein, {"is_distilled": True}, "shared", "shared 3, .* distilled .* expected guidance off"),
    ],
    ids=["schnell", "klein", "distilled"],
)
def test_guidance_that_a_model_does_not_have_is_refused(make, config, guidance, line):
    with pytest.raises(ValueError, match=line):
        denoiser_of(drawn(make, **config), guidance)


# The shift


def test_mu_of_flux_2_depends_on_tokens_and_steps():
    """Of 4,096 tokens, and so of 1024×1024 pixels, with the line of the network's authors for 10 steps."""
    mu = 8.73809524e-05 * 4096 + 1.89833333
    assert EmpiricalShift(tokens=4096) == EmpiricalShift(tokens=4096)
    assert EmpiricalShift(tokens=4096)(10) == pytest.approx(mu)
    assert EmpiricalShift(tokens=4096)(200) == pytest.approx(0.00016927 * 4096 + 0.45666666)
    path = backbone_of(drawn(flux2_klein)).path((16, 64, 64))
    second = path.steps(10)[1][0]
    assert second == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / 0.9 - 1))


def test_mu_of_flux_1_depends_on_tokens():
    """1.15 for 4,096 and 0.5 for 256, as the scheduler of dev says; schnell's is not shifted."""
    dev = backbone_of(drawn(flux_dev))
    assert dev.path((4, 128, 128)).mu == pytest.approx(1.15)
    assert dev.path((4, 32, 32)).mu == pytest.approx(0.5)
    schnell = backbone_of(drawn(flux_schnell)).path((4, 128, 128))
    assert [t for t, _ in schnell.steps(4)] == [1.0, 0.75, 0.5, 0.25]


# Latents ↔ pixels


@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_decoded_latents_are_the_images_of_diffusers(make):
    pipeline = drawn(make)
    call = dict(prompt=PROMPTS[:1], height=HEIGHT, width=WIDTH, num_inference_steps=1, max_sequence_length=T5_TOKENS)
    latents, images = (
        pipeline(**call, guidance_scale=1.0, generator=generators(0), output_type=kind).images
        for kind in ("latent", "pt")
    )
    latents = LATENTS[make](pipeline, latents, HEIGHT, WIDTH)
    torch.testing.assert_close(backbone_of(pipeline).decode(latents), images, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_encoding_is_the_inverse_of_decoding(make):
    pipeline = drawn(make)
    backbone, vae = backbone_of(pipeline), pipeline.vae
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = backbone.encode_pixels(pixels, generators(0, 1))
        assert latents.shape == (2, *backbone.shape(HEIGHT, WIDTH))
        z = vae.encode(2 * pixels - 1).latent_dist.sample(generators(0, 1))
        expected = vae.decode(z).sample / 2 + 0.5
        torch.testing.assert_close(backbone.decode(latents).clamp(0, 1), expected.clamp(0, 1), rtol=0, atol=2e-6)


def test_encoded_latents_are_those_that_diffusers_starts_from():
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    dev = drawn(flux_dev)
    image_to_image = FluxImg2ImgPipeline(**dev.components)
    with torch.no_grad():
        expected = image_to_image._encode_vae_image(2 * pixels - 1, generators(0)[0])
        torch.testing.assert_close(backbone_of(dev).encode_pixels(pixels, generators(0)), expected)
