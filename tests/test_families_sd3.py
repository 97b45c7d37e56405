"""Stable Diffusion 3 and 3.5: what is of this family alone."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.flow import network_dtype
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_base, load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import rollout
from tests.fixtures_families import save_family
from tests.fixtures_tiny import generators, refused

PROMPTS = ["a red apple", "a cat on a blue background"]
REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_family("sd3", tmp_path_factory.mktemp("sd3") / "base")


@pytest.fixture
def pipeline(base):
    return load_pipeline(str(base))


def latents_of(pipeline, size=16, **options):
    """Of diffusers' own pipeline, in 4 steps on linspace(1, 1/N)."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        height=size,
        width=size,
        guidance_scale=3.0,
        sigmas=[1, 0.75, 0.5, 0.25],
        generator=generators(0, 1),
        output_type="latent",
        **options,
    ).images


def euler(backbone, size=16):
    """The same by stepfuse's transitions of variance 0."""
    path = backbone.path(backbone.shape(size, size))
    denoiser = Denoiser(backbone=backbone, path=path, guidance=Guidance(scale=3.0))
    conditioning = backbone.encode(PROMPTS)
    x = torch.cat([torch.randn(1, 4, size // 2, size // 2, generator=each) for each in generators(0, 1)])
    with torch.no_grad():
        for t, s in path.steps(4):
            (velocity,) = denoiser.predictions(x, t, conditioning, [BASE])
            x = transition(path, x, velocity, t, s, torch.zeros(1, 1, 1, 1)).mean
    return x


# Configurations


def test_a_pipeline_saved_without_t5_is_loaded_as_it_is(base, pipeline):
    index = json.loads((base / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    with pytest.raises(ValueError, match="text_encoder_3"):
        StableDiffusion3Pipeline.from_pretrained(base)
    assert pipeline.text_encoder_3 is None


def test_fused_projections_are_refused_for_they_ignore_loras(base, pipeline):
    pipeline.transformer.transformer_blocks[0].attn.fuse_projections(fuse=True)
    with refused("fused projections", "unfuse_qkv_projections"):
        backbone_of(pipeline).check()


@pytest.mark.parametrize("key", ["in_channels", "out_channels"])
def test_other_channels_than_the_autoencoders_are_refused(pipeline, key):
    pipeline.transformer.register_to_config(**{key: 9})
    with refused(f"{key} 9", "expected 4"):
        backbone_of(pipeline).check()


def test_sizes_are_multiples_of_a_patch_and_within_the_positions_of_the_network(pipeline):
    backbone = backbone_of(pipeline)
    assert backbone.shape() == (4, 8, 8)
    assert backbone.shape(32, 20) == (4, 16, 10)
    with refused("height is 18", "multiple of 4"):
        backbone.size(18, 16)
    with refused("width is 36", "32 at most", "pos_embed_max_size"):
        backbone.size(16, 36)


def test_a_scheduler_of_another_kind_is_refused(pipeline):
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    with refused("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        backbone_of(pipeline).check()


@pytest.mark.parametrize("size", [16, 32])
def test_a_shift_by_the_number_of_tokens_is_that_of_diffusers(pipeline, size):
    """16 or 64 tokens, between a shift of 0.5 at 16 and 2 at 64."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=2.0
    )
    expected = latents_of(pipeline, size)
    torch.testing.assert_close(euler(backbone_of(pipeline), size), expected, rtol=1e-5, atol=1e-5)
    assert backbone_of(pipeline).path(backbone_of(pipeline).shape(size, size)).mu == (0.5 if size == 16 else 2.0)


# Tokens of a prompt


def test_number_of_tokens_and_resolution_are_recorded_with_the_base_and_taken_again(base, run_training, tmp_path):
    """Zeros that stand for T5's tokens are attended to: 1 of them is another base than 256."""
    run_training(
        "ddpo",
        pretrained_model_name_or_path=base,
        max_train_steps=1,
        max_sequence_length=1,
        resolution=32,
        output_dir="mine",
    )
    recorded = read_adapter("mine").base
    assert (recorded["max_sequence_length"], recorded["resolution"]) == (1, 32)
    create_set("set", ["mine"], base_schedule=EtaSchedule(eta=0.0))
    backbone = backbone_of(load_base(load_set("set").base))
    assert backbone.size() == (32, 32)
    expected = latents_of(load_pipeline(str(base)), 32, max_sequence_length=1)
    torch.testing.assert_close(euler(backbone, 32), expected, rtol=1e-5, atol=1e-5)
    assert (latents_of(load_pipeline(str(base)), 32, max_sequence_length=256) - expected).abs().max() > 1e-3
    given = load_pipeline(str(base))  # which knows neither
    (image,) = FusedSampler.from_pretrained("set", pipeline=given).sample("a fox", num_inference_steps=1)
    assert image.size == (32, 32)
    assert backbone_of(given).max_sequence_length == 1


def test_a_base_states_its_number_of_tokens_in_its_model_index(base, tmp_path):
    index = shutil.copytree(base, tmp_path / "base") / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"max_sequence_length": 3}))
    backbone = backbone_of(load_pipeline(str(tmp_path / "base")))
    assert backbone.encode(PROMPTS).positive["prompt_embeds"].shape == (2, 16 + 3, 80)
    assert describe_base(backbone, str(tmp_path / "base"))["max_sequence_length"] == 3


def test_cut_prompts_are_those_longer_than_both_clip_encoders_take(pipeline):
    cut = cut_prompts(backbone_of(pipeline), ["a fox", "a fox on a green background " * 5])
    assert [each.tokenizer for each in cut] == ["tokenizer", "tokenizer_2"]
    assert {each.limit for each in cut} == {16}


def test_embeddings_in_place_of_prompts_are_those_of_the_prompts(base, pipeline):
    backbone = backbone_of(pipeline)
    given = backbone.encode(PROMPTS, ["a dog", None])
    embeds = {
        "prompt_embeds": given.positive["prompt_embeds"],
        "pooled_prompt_embeds": given.positive["pooled_prompt_embeds"],
        "negative_prompt_embeds": given.negative["prompt_embeds"],
        "negative_pooled_prompt_embeds": given.negative["pooled_prompt_embeds"],
    }
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        setattr(pipeline, name, None)
    again = backbone.encode(None, **embeds)
    for kind in ("positive", "negative"):
        assert all(torch.equal(value, getattr(again, kind)[name]) for name, value in getattr(given, kind).items())
    with refused("tokenizer"):
        backbone.encode(PROMPTS)
    with refused("prompt_embeds", "pooled_prompt_embeds is not"):
        backbone.check_embeds(["prompt_embeds"])


def test_the_pipeline_of_a_set_takes_prompts_embeddings_and_callbacks(base, run_training):
    run_training("dpo", pretrained_model_name_or_path=base, max_train_steps=1, output_dir="mine")
    create_set("set", ["mine"])
    pipeline = FusedPipeline.from_pretrained("set")
    pipeline.set_progress_bar_config(disable=True)
    given = pipeline.sampler.backbone.encode(PROMPTS)
    embeds = {
        f"{'negative_' if kind == 'negative' else ''}{name}": value
        for kind in ("positive", "negative")
        for name, value in getattr(given, kind).items()
    }
    times = []
    draw = dict(generator=generators(0, 1), output_type="np")
    by_embeddings = pipeline(**embeds, **draw, callback_on_step_end=lambda _, index, t, given: times.append(t)).images
    draw = dict(generator=generators(0, 1), output_type="np")
    assert (pipeline(PROMPTS, **draw).images == by_embeddings).all()
    assert by_embeddings.shape == (2, 16, 16, 3)
    assert times == pytest.approx([1000, 6000 / 7, 600])  # of linspace(1, 1/3), shifted by 3: 3 t / (1 + 2 t)
    with refused("prompt_embeds_mask", "pooled_prompt_embeds"):
        pipeline(PROMPTS, prompt_embeds_mask=torch.ones(2, 3))


# Precision


def test_in_16_bits_latents_and_times_stay_in_32_and_the_first_ratio_is_1(base):
    """bfloat16 has no number between 920 and 924: a time of 922.5 would be told as another."""
    backbone = backbone_of(load_pipeline(str(base), dtype=torch.bfloat16))
    add_lora(backbone.network, "mine", rank=2, alpha=2, targets=list(backbone.targets), seed=0)
    told = []
    backbone.network.register_forward_pre_hook(
        lambda _, __, inputs: told.append((inputs["timestep"], inputs["hidden_states"].dtype)), with_kwargs=True
    )
    path = backbone.path(backbone.shape())
    sampling = Sampling(
        denoiser=Denoiser(backbone=backbone, path=path, guidance=Guidance(scale=3.0)),
        objectives=(Expert.adapter("mine", EtaSchedule(eta=0.7)),),
        steps=path.steps(3),
        shape=backbone.shape(),
    )
    conditioning = backbone.encode(PROMPTS)
    stored = rollout(sampling, conditioning, generators(0, 1))
    assert {time.dtype for time, _ in told} == {torch.float32}
    assert {dtype for _, dtype in told} == {torch.bfloat16}
    for step in stored.steps:
        assert step.x_t.dtype == step.x_s.dtype == torch.float32
        ((policy, reference),) = step_gaussians(
            Policy(backbone, ["mine"], [sampling.objectives[0].schedule]), sampling, [step], conditioning
        )
        assert torch.equal(policy.log_prob(step.x_s), step.log_prob)
        assert policy.kl(reference).abs().max() == 0  # a fresh LoRA


# Other models' files


def test_an_adapter_of_another_base_is_refused_by_name(base, pipeline, adapters):
    """`adapters` are of a Stable Diffusion 1.x."""
    backbone = backbone_of(pipeline)
    with refused("'a'", "base"):
        load_adapter(backbone, read_adapter(adapters / "a"), describe_base(backbone, str(base)))


def test_a_guidance_scale_as_an_input_is_refused_for_a_network_that_takes_none(base, pipeline, run_training):
    backbone = backbone_of(pipeline)
    with refused("embedded", "SD3Transformer2DModel", "shared, full, off"):
        Denoiser(backbone=backbone, path=backbone.path(), guidance=Guidance(source="embedded"))
    with pytest.raises(SystemExit, match=r"\Aerror: guidance embedded[^\n]+\Z"):
        run_training("ddpo", pretrained_model_name_or_path=base, guidance="embedded", max_train_steps=1)


def test_a_set_of_it_is_not_run_on_another_pipeline(base, small_set):
    with refused("not the set's base"):
        FusedSampler.from_pretrained(small_set, pipeline=load_pipeline(str(base)))


def test_the_precision_of_inputs_is_that_of_the_network_with_layerwise_casting_too(pipeline):
    network = pipeline.transformer
    assert network_dtype(network) == network.dtype == torch.float32
    network.to(torch.bfloat16)
    assert network_dtype(network) == network.dtype == torch.bfloat16
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    assert network_dtype(network) == network.dtype == torch.float16
