"""FLUX.1 and FLUX.2: prompts and their templates, LoRAs, 16 bits, and the models that are refused."""

import re

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
)
from torch import nn

from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.registry import backbone_class, backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter, write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.losses import ddpo_loss
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import rollout
from tests.fixtures_families import save_family
from tests.fixtures_families_flux import (
    CHAT_TOKENS,
    PROMPTS,
    STEPS,
    T5_TOKENS,
    denoiser_of,
    drawn,
    flux2_dev,
    flux2_klein,
    flux_dev,
    flux_schnell,
)
from tests.fixtures_tiny import generators

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
        denoiser=denoiser, objectives=(Expert.adapter("a", schedule),), steps=denoiser.path.steps(STEPS), shape=shape
    )
    policy = Policy(backbone, ["a"], [schedule])
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
    guided = create_set(tmp_path / "set", [tmp_path / "a"], guidance="embedded", guidance_scale=3.5)
    assert guided.describe_guidance() == "embedded 3.5; adapters trained with off"
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
