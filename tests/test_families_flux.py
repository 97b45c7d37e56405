"""FLUX.1 and FLUX.2: packing, guidance of each model, the shift of each, latents ↔ pixels, and what is refused."""

import math
import re

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    Flux2KleinPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.flux2 import EmpiricalShift
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.registry import backbone_class, backbone_of
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter, write_adapter
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.lora import Policy, add_lora, step_gaussians
from stepfuse.train.losses import ddpo_loss
from stepfuse.train.rollout import Sampling, rollout
from tests.fixtures_families import save_family
from tests.fixtures_families_flux import (
    CHAT_TOKENS,
    T5_TOKENS,
    flux2_dev,
    flux2_klein,
    flux_dev,
    flux_schnell,
    normalised,
    unpacked,
    untokened,
)
from tests.fixtures_tiny import generators

PROMPTS = ["a red apple", "a cat on a blue background"]
HEIGHT, WIDTH = 16, 24
STEPS = 3
SCALE = 3.0


def drawn(make, **config):
    """A pipeline of random weights, the same every time, none of which are zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = make(**config)
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def denoiser_of(pipeline, guidance, height=HEIGHT, width=WIDTH):
    backbone = backbone_of(pipeline)
    backbone.check()
    shape = backbone.shape(height, width)
    chosen = Guidance(source=guidance, scale=SCALE)
    return Denoiser(backbone=backbone, path=backbone.path(shape), guidance=chosen), shape


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


# Prompts


@pytest.mark.parametrize(
    ("make", "tokenizer", "limit"),
    [
        (flux_dev, "tokenizer_2", T5_TOKENS),
        (flux2_klein, "tokenizer", CHAT_TOKENS - len("_user\n")),  # one token for <|im_start|>
        (flux2_dev, "tokenizer", CHAT_TOKENS - len("_system\ndraw_\n_user\n")),
    ],
    ids=["flux", "klein", "flux2"],
)
def test_what_is_cut_of_a_prompt_is_what_changes_nothing(make, tokenizer, limit):
    """Of T5 the end of the text takes one token; a chat template takes what stands before the prompt."""
    backbone = backbone_of(drawn(make))
    end = int(tokenizer == "tokenizer_2")
    space = end  # T5's tokenizer has a token at the beginning of a word
    kept = "x" * (limit - end - space)
    assert not cut_prompts(backbone, [kept])
    (cut,) = cut_prompts(backbone, [kept + "yes"])
    assert (cut.tokenizer, cut.limit, cut.tokens, cut.removed) == (tokenizer, limit, limit + 3, "yes")
    embeds = [backbone.encode([text]).positive["prompt_embeds"] for text in (kept + "yes", kept + "no", kept[1:])]
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.allclose(embeds[0], embeds[2], atol=1e-3)


@pytest.mark.parametrize("make", [flux_schnell, flux2_klein])
def test_prompts_have_512_tokens_unless_the_base_records_another_number(make):
    pipeline = drawn(make)
    backbone = backbone_of(pipeline)
    length = T5_TOKENS if make is flux_schnell else CHAT_TOKENS
    assert backbone.encode(["a cat"]).positive["prompt_embeds"].shape[1] == length
    pipeline.register_to_config(**{LENGTH: None})
    assert backbone.encode(["a cat"]).positive["prompt_embeds"].shape[1] == 512


def test_embeddings_of_other_lengths_than_the_negative_ones_are_refused():
    """They would be padded with zeros, which the network attends to."""
    backbone = backbone_of(drawn(flux_dev))
    given = dict(prompt_embeds=torch.zeros(1, 7, 16), pooled_prompt_embeds=torch.zeros(1, 32))
    with pytest.raises(ValueError, match="prompt_embeds have 7 tokens and those of the negative prompt 32"):
        backbone.encode(None, **given)


# LoRAs and 16 bits


@pytest.mark.parametrize(("make", "output"), [(flux_dev, "proj_out"), (flux2_klein, "attn.to_out")])
def test_all_projections_of_attention_get_a_lora_by_default(make, output):
    backbone = backbone_of(drawn(make))
    add_lora(backbone.network, "a", rank=2, alpha=2, targets=list(backbone.targets), seed=0)
    found = set(network_factors(backbone.network, "a"))
    joint = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    single = ("attn.to_q", "attn.to_k", "attn.to_v") if make is flux_dev else ("attn.to_qkv_mlp_proj",)
    expected = {f"transformer_blocks.0.attn.{name}" for name in joint}
    expected |= {f"single_transformer_blocks.{i}.{name}" for i in (0, 1) for name in (*single, output)}
    assert found == expected


@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_in_bf16_latents_stay_float32_and_the_first_ddpo_ratio_is_exactly_1(make):
    pipeline = drawn(make).to(torch.bfloat16)
    denoiser, shape = denoiser_of(pipeline, "embedded" if make is flux_dev else "shared", 16, 16)
    backbone, schedule = denoiser.backbone, EtaSchedule(eta=0.8)
    add_lora(backbone.network, "a", rank=2, alpha=4, targets=list(backbone.targets), seed=0)
    for key, value in backbone.network.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(
        denoiser=denoiser, adapter="a", schedule=schedule, steps=denoiser.path.steps(STEPS), shape=shape
    )
    policy = Policy(backbone, "a", schedule)
    conditioning = backbone.encode(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps = rollout(sampling, conditioning, generators(0, 1)).steps
    assert len(steps) == STEPS - 1  # the last has no noise
    for step in steps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ((gaussian, reference),) = step_gaussians(policy, sampling, [step], conditioning)
        assert {value.dtype for value in (step.x_t, step.x_s, step.log_prob, gaussian.mean)} == {torch.float32}
        assert not torch.equal(step.x_s, step.x_s.bfloat16().float())
        log_prob, advantage = gaussian.log_prob(step.x_s), torch.tensor([2.0, -0.5])
        assert ddpo_loss(log_prob, step.log_prob, advantage, clip_range=1e-6).tolist() == (-advantage).tolist()
        assert (gaussian.kl(reference) > 1e-4).all()


def test_an_adapter_of_another_family_is_refused_by_both_names(tmp_path):
    bases = {name: save_family(name, tmp_path / name) for name in ("sd3", "flux")}
    sd3, flux = (backbone_of(load_pipeline(str(base))) for base in bases.values())
    add_lora(flux.network, "a", rank=2, alpha=2, targets=["to_q"], seed=0)
    write_adapter(
        Adapter(
            folder=tmp_path / "a",
            objective=Objective(name="a", reward="a", variance=EtaSchedule(eta=1.0), beta=0.1),
            base=describe_base(flux, str(bases["flux"])),
            guidance="off",
            guidance_scale=1.0,
            num_inference_steps=3,
        ),
        network_factors(flux.network, "a"),
        flux.part,
    )
    both = f"{bases['flux']}'; load that one in place of '{bases['sd3']}', a StableDiffusion3Pipeline"
    with pytest.raises(ValueError, match=re.escape(both)):
        load_adapter(sd3, read_adapter(tmp_path / "a"), describe_base(sd3, str(bases["sd3"])))


# What is refused


@pytest.mark.parametrize("size", [(18, 16), (16, 22), (0, 16)])
@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_sizes_of_which_a_token_would_be_cut_are_refused(make, size):
    """A token is 2×2 latents, and a latent of these autoencoders 2×2 pixels."""
    with pytest.raises(ValueError, match="expected a positive multiple of 4"):
        backbone_of(drawn(make)).shape(*size)


@pytest.mark.parametrize(
    "name",
    [
        *("FluxControlPipeline", "FluxFillPipeline", "FluxKontextPipeline", "FluxImg2ImgPipeline"),
        *("FluxControlNetPipeline", "FluxPriorReduxPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"),
    ],
)
def test_pipelines_that_are_given_an_image_are_of_no_family(name):
    with pytest.raises(ValueError, match=f"{name} is of no model family"):
        backbone_class(name)


@pytest.mark.parametrize(
    ("make", "config", "line"),
    [
        (flux_dev, {"in_channels": 96, "out_channels": 16}, "in_channels 96; expected 16, .* such as Fill and Control"),
        (flux_dev, {"out_channels": 8}, "out_channels 8; expected 16"),
        (flux2_dev, {"in_channels": 32}, "in_channels 32; expected 16"),
        (flux2_klein, {"patch_size": 2}, "patch_size 2; expected 1"),
        (flux2_klein, {"guidance_embeds": True}, "guidance_embeds True; expected False in a Flux2KleinPipeline"),
    ],
    ids=["fill", "out_channels", "in_channels", "patch_size", "guidance_embeds"],
)
def test_networks_of_other_variants_are_refused(make, config, line):
    with pytest.raises(ValueError, match=line):
        backbone_of(drawn(make, **config)).check()


@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_fused_projections_are_refused_until_they_are_undone(make):
    backbone = backbone_of(drawn(make))
    backbone.network.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fused projections.*unfuse_qkv_projections"):
        backbone.check()
    backbone.network.unfuse_qkv_projections()
    backbone.check()


def test_an_autoencoder_without_statistics_is_refused():
    pipeline = drawn(flux2_klein)
    pipeline.vae = AutoencoderKL(latent_channels=4)
    with pytest.raises(ValueError, match="vae is a AutoencoderKL; expected AutoencoderKLFlux2"):
        backbone_of(pipeline).check()


@pytest.mark.parametrize("make", [flux_dev, flux2_klein])
def test_a_scheduler_of_another_kind_is_refused(make):
    pipeline = drawn(make)
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match="DDIMScheduler; expected FlowMatchEulerDiscreteScheduler"):
        backbone_of(pipeline).check()


def test_image_prompts_are_refused():
    pipeline = drawn(flux_dev)
    pipeline.transformer.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter leaves it
    with pytest.raises(ValueError, match="unload_ip_adapter"):
        backbone_of(pipeline).check()
