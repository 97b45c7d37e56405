"""Qwen-Image and Z-Image: precision, LoRAs of layers that do not keep images apart, and configurations."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.registry import backbone_class, backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.rules.plan import Expert
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy, SharedForward, add_lora
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import rollout
from stepfuse.train.settings import DDPOSettings
from stepfuse.train.setup import Setup
from tests.fixtures_families import FAMILIES
from tests.fixtures_tiny import generators, networks, refused

BOTH = ("qwen_image", "z_image")
PROMPTS = ["a red apple", "a cat on a blue background"]
SIZE = 16


@pytest.fixture
def fresh(qwen_bases):
    """Backbones to be changed."""
    return lambda name, **options: backbone_of(load_pipeline(str(qwen_bases[name]), **options))


def randomise(backbone):
    """So that LoRAs change what the network predicts."""
    generator = torch.Generator().manual_seed(0)
    for key, value in backbone.network.named_parameters():
        if "lora_B" in key:
            value.data.normal_(std=0.1, generator=generator)


# Precision


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_latents_stay_in_32_and_the_first_ratio_is_exactly_1(fresh, name, autocast):
    backbone = fresh(name, dtype=torch.bfloat16)
    add_lora(backbone.network, "mine", rank=2, alpha=2, targets=list(backbone.targets), seed=0)
    randomise(backbone)
    told = []
    backbone.network.register_forward_pre_hook(
        lambda _, inputs, named: told.append(named.get("timestep", inputs[1] if inputs else None)), with_kwargs=True
    )
    path = backbone.path(backbone.shape(SIZE, SIZE))
    sampling = Sampling(
        denoiser=Denoiser(backbone=backbone, path=path, guidance=Guidance(scale=3.0)),
        objectives=(Expert.adapter("mine", EtaSchedule(eta=0.7)),),
        steps=path.steps(3),
        shape=backbone.shape(SIZE, SIZE),
    )
    conditioning = backbone.encode(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        stored = rollout(sampling, conditioning, generators(0, 1))
    assert {time.dtype for time in told} == {torch.float32}
    assert len(stored.steps) == 2
    for step in stored.steps:
        assert step.x_t.dtype == step.x_s.dtype == torch.float32
        assert not torch.equal(step.x_s, step.x_s.bfloat16().float())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            policy = Policy(backbone, ["mine"], [sampling.objectives[0].schedule])
            ((gaussian, reference),) = step_gaussians(policy, sampling, [step], conditioning)
        assert torch.equal(gaussian.log_prob(step.x_s), step.log_prob)
        assert (gaussian.kl(reference) > 1e-4).all()  # so it is not by the LoRA being nothing


# LoRAs of layers that do not keep the rows of a batch apart


@pytest.mark.parametrize("layer", FAMILIES["z_image"].refused)
def test_loras_of_the_embedders_of_z_image_are_not_batched(fresh, layer):
    backbone = fresh("z_image")
    add_lora(backbone.network, "mine", rank=2, alpha=2, targets=["to_q", layer], seed=0)
    with refused("'mine'", layer, "forwards='separate'"):
        BatchedAdapters(backbone.network, ["mine"], backbone.unbatched)
    randomise(backbone)
    conditioning, x = (
        backbone.encode(PROMPTS),
        torch.randn(2, *backbone.shape(SIZE, SIZE), generator=torch.Generator().manual_seed(0)),
    )
    denoiser = Denoiser(backbone=backbone, path=backbone.path())
    with torch.no_grad():
        base, adapted = denoiser.predictions(x, 0.5, conditioning, networks(None, "mine"))
        _, alone = denoiser.predictions(x[:1], 0.5, conditioning[:1], networks(None, "mine"))
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(adapted[:1], alone, rtol=0, atol=1e-5)


def test_base_and_policy_of_z_image_share_a_forward_where_the_lora_allows_it(qwen_bases, own_accelerator, tmp_path):
    def setup(**options):
        settings = DDPOSettings(
            pretrained_model_name_or_path=str(qwen_bases["z_image"]),
            prompts="prompts.txt",
            reward="aesthetic",
            output_dir=str(tmp_path / "out"),
            resolution=SIZE,
            sample_num_steps=3,
            timesteps_per_forward=2,
            **options,
        )
        return Setup(settings, Accelerator(), reward=None, prompts=PROMPTS)

    for layer in FAMILIES["z_image"].refused:
        assert setup(lora_target_modules=["to_q", layer]).sampling.denoiser.batched is None
    made = setup()
    backbone, sampling = made.backbone, made.sampling
    assert isinstance(sampling.denoiser.batched, SharedForward)
    randomise(backbone)
    conditioning = backbone.encode(PROMPTS)
    apart = replace(sampling, denoiser=replace(sampling.denoiser, batched=None))
    runs = [rollout(each, conditioning, generators(0, 1)).steps for each in (sampling, apart)]
    for one, two in zip(*runs, strict=True):
        for name in ("x_s", "reference", "negative", "log_prob"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-4, msg=name)
    policy = Policy(backbone, [sampling.objectives[0].name], [sampling.objectives[0].schedule])
    for step, (gaussian, base) in zip(
        runs[0], step_gaussians(policy, sampling, runs[0], conditioning), strict=True
    ):  # both steps in one forward
        torch.testing.assert_close(gaussian.log_prob(step.x_s), step.log_prob, rtol=1e-4, atol=1e-2)
        assert (gaussian.kl(base) > 1e-4).all()


# Configurations


@pytest.mark.parametrize(
    "name", ["QwenImageEditPipeline", "QwenImageLayeredPipeline", "QwenImageImg2ImgPipeline", "ZImageOmniPipeline"]
)
def test_pipelines_that_need_an_image_are_refused_by_name(name):
    with refused(name, "no model family", "QwenImagePipeline"):
        backbone_class(name)


@pytest.mark.parametrize(
    ("name", "part", "change", "told"),
    [
        ("qwen_image", "transformer", {"guidance_embeds": True}, "guidance_embeds True"),
        ("qwen_image", "transformer", {"zero_cond_t": True}, "edit images"),
        ("qwen_image", "transformer", {"in_channels": 64}, "in_channels 64; expected 16"),
        ("qwen_image", "transformer", {"out_channels": 16}, "out_channels 16; expected 4"),
        ("qwen_image", "transformer", {"patch_size": 1}, "patch_size 1; expected 2"),
        ("qwen_image", "vae", {"input_channels": 4}, "input_channels 4; expected 3"),
        ("qwen_image", "vae", {"latents_std": [1.0]}, "1 numbers in latents_std; expected 4"),
        ("z_image", "transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim 8; expected None"),
        ("z_image", "transformer", {"in_channels": 16}, "in_channels 16; expected 4"),
        ("z_image", "transformer", {"all_patch_size": [1]}, "expected 2 with 1"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused_by_its_name(fresh, name, part, change, told):
    backbone = fresh(name)
    getattr(backbone.pipeline, part).register_to_config(**change)
    with refused(part, told):
        backbone.check()


def test_another_autoencoder_or_a_tokenizer_without_chat_template_is_refused(fresh):
    qwen, z_image = fresh("qwen_image"), fresh("z_image")
    qwen.pipeline.vae = z_image.pipeline.vae
    with refused("vae is a AutoencoderKL", "AutoencoderKLQwenImage"):
        qwen.check()
    z_image.pipeline.tokenizer.chat_template = None
    with refused("tokenizer has no chat_template"):
        z_image.check_can_encode()
    for backbone in (qwen, z_image):
        backbone.pipeline.tokenizer = backbone.pipeline.text_encoder = None
        assert cut_prompts(backbone, PROMPTS) == []  # nothing is known of them
        with refused("the pipeline has no tokenizer", "prompt_embeds_mask"):
            backbone.encode(PROMPTS)


@pytest.mark.parametrize(("name", "last"), [("qwen_image", 0.2), ("z_image", None)])
def test_a_base_records_how_its_steps_are_spaced(fresh, qwen_bases, name, last):
    found = describe_base(fresh(name), str(qwen_bases[name]))["noise_path"]
    assert found["shift_terminal"] == last
    assert found["grid"] == "linspace(1, 1/N)"
