"""SANA and Lumina 2: what each does that the other families do not."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.train.lora import add_lora
from tests.fixtures_families import save_family
from tests.fixtures_tiny import generators, refused

PROMPTS = ["a red apple", "a cat on a blue background"]
FLOW_SOLVER = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)  # SANA's own


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: save_family(name, root / name) for name in ("sana", "lumina2")}


@pytest.fixture
def sana(bases):
    return backbone_of(load_pipeline(str(bases["sana"])))


@pytest.fixture
def lumina2(bases):
    return backbone_of(load_pipeline(str(bases["lumina2"])))


# SANA.


def test_the_path_of_a_flow_solver_is_linspace_with_its_shift(sana):
    """3 s / (1 + 2 s) of 1, 3/4, 1/2 and 1/4."""
    sana.pipeline.scheduler = DPMSolverMultistepScheduler(**FLOW_SOLVER)
    sana.check()
    times = [t for t, _ in sana.path(sana.shape()).steps(4)]
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert sana.path().describe() == type(sana.path())(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).describe()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_order_1_of_the_flow_solver_is_an_euler_step_and_order_2_is_not():
    """x_s = x_t + (s - t) v, with eta 0."""
    x, velocity = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for order in (1, 2):
        solver = DPMSolverMultistepScheduler(**FLOW_SOLVER, solver_order=order)
        solver.set_timesteps(8)
        x_t, differences = x, []
        for i in range(3):
            euler = x_t + (solver.sigmas[i + 1] - solver.sigmas[i]) * velocity * (i + 1)
            x_t = solver.step(velocity * (i + 1), solver.timesteps[i], x_t).prev_sample
            differences.append((x_t - euler).abs().max().item())
        assert (max(differences) < 1e-5) == (order == 1)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DPMSolverMultistepScheduler(), "expected FlowMatchEulerDiscreteScheduler"),
        (DPMSolverMultistepScheduler(**FLOW_SOLVER, thresholding=True), "thresholding True"),
    ],
)
def test_another_scheduler_is_refused(sana, scheduler, expected):
    sana.pipeline.scheduler = scheduler
    with refused(expected):
        sana.check()


def test_positive_prompts_get_the_instruction_and_negative_ones_do_not(sana):
    """As in the pipeline, of whose 300 positions the mask counts those of the begin, and of the prompt's tokens."""
    conditioning = sana.encode(PROMPTS, PROMPTS)
    arguments = dict(do_classifier_free_guidance=False, complex_human_instruction=None)
    plain, mask, *_ = sana.pipeline.encode_prompt(PROMPTS, **arguments)
    torch.testing.assert_close(conditioning.negative["prompt_embeds"], plain)
    assert torch.equal(conditioning.negative["prompt_attention_mask"], mask)
    assert conditioning.positive["prompt_embeds"].shape == (2, 300, 16)
    assert (conditioning.positive["prompt_embeds"][:, 1:5] - plain[:, 1:5]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_what_is_cut_of_a_prompt_is_what_the_embedding_does_not_depend_on(bases, name):
    backbone = backbone_of(load_pipeline(str(bases[name])))
    (limit,) = backbone.token_limits().values()
    words = ["a"] * (limit - 1)  # with the begin of the text just as many
    fits, longer = " ".join(words), " ".join([*words, "cat"])
    assert len(backbone.pipeline.tokenizer(fits).input_ids) == limit
    assert [cut.prompt for cut in cut_prompts(backbone, [fits, longer])] == [longer]
    embeds = backbone.encode([fits, longer, " ".join(words[:-1])]).positive
    valid = embeds["prompt_attention_mask"].bool()
    assert valid.sum(1).tolist() == [valid.shape[1]] * 2 + [valid.shape[1] - 1]
    torch.testing.assert_close(embeds["prompt_embeds"][0], embeds["prompt_embeds"][1])


def test_the_prediction_is_the_first_half_of_the_channels_and_the_time_is_scaled(sana):
    x, times = torch.randn(2, *sana.shape()), torch.tensor([900.0, 100.0])
    conditioning = sana.encode(PROMPTS)
    inputs = conditioning.inputs("+")
    with torch.no_grad():
        output = sana.network(
            x, inputs["prompt_embeds"], times * 0.5, encoder_attention_mask=inputs["prompt_attention_mask"]
        ).sample
        predicted = sana.predict(x, times, inputs)
    assert output.shape[1] == 2 * x.shape[1]
    torch.testing.assert_close(predicted, output[:, :4])


def test_pixels_are_the_pipelines_and_encoding_has_no_randomness(sana):
    z = torch.randn(1, *sana.shape())
    with torch.no_grad():
        expected = sana.pipeline.vae.decode(z / sana.pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(sana.decode_unclamped(z), expected)
        pixels = torch.rand(1, 3, 32, 32)
        latents = [sana.encode_pixels(pixels, generators(seed)) for seed in (0, 1)]
    assert torch.equal(*latents)
    torch.testing.assert_close(latents[0], 0.4 * sana.pipeline.vae.encode(2 * pixels - 1).latent.detach())


def test_a_lora_of_a_depthwise_convolution_is_refused_by_name(sana):
    with refused("rank 2 for transformer_blocks.0.ff.conv_depth; expected a multiple of its 80 groups"):
        add_lora(sana.network, "a", rank=2, alpha=2, targets=["to_q", "conv_depth"], seed=0)
    assert not any("lora" in name for name, _ in sana.network.named_parameters())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_a_lora_of_a_depthwise_convolution_of_fitting_rank_is_not_batched(sana):
    add_lora(sana.network, "a", rank=80, alpha=2, targets=["conv_depth"], seed=0)
    with refused("the LoRA of transformer_blocks.0.ff.conv_depth is of a convolution with groups"):
        BatchedAdapters(sana.network, ["a"])


# Both.


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("sana", "text_encoder", "Gemma2Model"),
        ("sana", "vae", "AutoencoderDC"),
        ("lumina2", "text_encoder", "Gemma2Model"),
    ],
)
def test_parts_that_overflow_in_float16_are_refused(bases, name, part, kind):
    pipeline = load_pipeline(str(bases[name]))
    getattr(pipeline, part).to(torch.float16)
    with refused(f"{part} is in float16, in which a {kind} overflows; use bfloat16 or float32"):
        backbone_of(pipeline).check()


# Lumina 2.


def test_the_system_prompt_is_before_positive_prompts_only(lumina2):
    conditioning = lumina2.encode(PROMPTS, PROMPTS)
    embeds = lumina2.pipeline.encode_prompt(PROMPTS, negative_prompt=PROMPTS)
    for kind, (value, mask) in zip(
        (conditioning.positive, conditioning.negative), (embeds[:2], embeds[2:]), strict=True
    ):
        torch.testing.assert_close(kind["prompt_embeds"], value)
        assert torch.equal(kind["prompt_attention_mask"], mask)
    lengths = [part["prompt_attention_mask"].sum(1) for part in (conditioning.positive, conditioning.negative)]
    assert (lengths[0] > lengths[1] + 20).all()


def test_the_norm_of_each_row_of_pixels_is_that_of_the_prompted_prediction(lumina2):
    """(3, 4) + 2 ((3, 4) - (1, 1)) is (7, 10), of norm √149; that of (3, 4) is 5."""
    positive, negative = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    guided = lumina2.guide(negative, positive, 3.0)
    torch.testing.assert_close(guided, torch.tensor([[[[7.0, 10.0]]]]) * 5 / 149**0.5)


def test_a_dynamic_shift_takes_the_number_of_channels_for_that_of_tokens(lumina2):
    """Which is diffusers' own: the base's grid is that of the pipeline, whatever the image's size."""
    config = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    lumina2.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    times = [t for t, _ in lumina2.path(lumina2.shape(64, 32)).steps(4)]
    lumina2.pipeline.set_progress_bar_config(disable=True)
    lumina2.pipeline(PROMPTS[0], height=64, width=32, num_inference_steps=4, output_type="latent")
    assert times == pytest.approx(lumina2.pipeline.scheduler.sigmas[:-1].tolist())
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (4 - 256)
    assert times == pytest.approx([np.exp(mu) / (np.exp(mu) + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)])


def test_sizes_that_the_positions_do_not_reach_are_refused(lumina2):
    with refused("height is 8208; expected 8192 at most"):
        lumina2.size(8208, 32)


def test_an_autoencoder_of_another_factor_is_refused(lumina2):
    lumina2.pipeline.vae.register_to_config(block_out_channels=(4, 4))
    with refused("the autoencoder shrinks images by 2; expected 8"):
        lumina2.check()
