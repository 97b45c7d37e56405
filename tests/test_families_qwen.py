"""Qwen-Image and Z-Image: prompts, guidance, sizes, noise levels and pixels, beside those of diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.backbones.qwen_image import pack, unpack
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.lora.mixture import BASE
from tests.fixtures_families import FAMILIES
from tests.fixtures_tiny import generators, refused

BOTH = ("qwen_image", "z_image")
PROMPTS = ["a red apple", "a cat on a blue background"]
SUFFIX = ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]  # of a chat template, behind the prompt
SIZE = 16


@pytest.fixture(scope="module")
def loaded(qwen_bases):
    """Backbones that tests leave as they are."""
    return {name: backbone_of(load_pipeline(str(base))) for name, base in qwen_bases.items()}


@pytest.fixture(params=BOTH)
def backbone(request, loaded):
    return loaded[request.param]


@pytest.fixture
def fresh(qwen_bases):
    """Backbones to be changed."""
    return lambda name, **options: backbone_of(load_pipeline(str(qwen_bases[name]), **options))


def noise(backbone, *seeds, size=SIZE):
    shape = backbone.shape(size, size)
    return torch.cat([torch.randn(1, *shape, generator=each) for each in generators(*seeds)])


def euler(backbone, guidance, size=SIZE, steps=2, **prompts):
    """Latents by transitions of variance 0."""
    path = backbone.path(backbone.shape(size, size))
    denoiser = Denoiser(backbone=backbone, path=path, guidance=guidance)
    conditioning = backbone.encode(PROMPTS, **prompts)
    x = noise(backbone, 0, 1, size=size)
    with torch.no_grad():
        for t, s in path.steps(steps):
            (velocity,) = denoiser.predictions(x, t, conditioning, [BASE])
            x = transition(path, x, velocity, t, s, torch.zeros(1, 1, 1, 1)).mean
    return x


def theirs(backbone, size=SIZE, steps=2, **options):
    """Latents of diffusers' own pipeline."""
    pipeline = backbone.pipeline
    pipeline.set_progress_bar_config(disable=True)
    common = dict(height=size, width=size, num_inference_steps=steps, generator=generators(0, 1))
    z = pipeline(list(PROMPTS), output_type="latent", **common | options).images
    return FAMILIES[backbone_name(backbone)].unpack(pipeline, z, size)


def backbone_name(backbone):
    return {"QwenImage": "qwen_image", "ZImage": "z_image"}[type(backbone).__name__]


# Rows and prompts


def test_a_row_among_longer_prompts_is_predicted_as_it_is_alone(backbone):
    prompts = [*PROMPTS, ""]
    conditioning = backbone.encode(prompts)
    x, times = noise(backbone, 0, 1, 2), torch.tensor([900.0, 500.0, 20.0])
    with torch.no_grad():
        together = backbone.predict(x, times, conditioning.inputs("+"))
        for row, prompt in enumerate(prompts):
            alone = backbone.predict(x[[row]], times[[row]], backbone.encode([prompt]).inputs("+"))
            difference = (alone[0] - together[row]).abs().max() / alone.abs().max()
            assert difference < 1e-6, prompt
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("prompts", "padding"), [(["a cat", "a fox"], 0), (PROMPTS, 3)])
def test_qwen_image_is_told_of_padding_where_there_is_some(loaded, prompts, padding):
    qwen, told = loaded["qwen_image"], []
    hook = qwen.network.register_forward_pre_hook(
        lambda _, __, named: told.append(named["encoder_hidden_states_mask"]), with_kwargs=True
    )
    inputs = qwen.encode(prompts).inputs("+")
    with hook, torch.no_grad():
        qwen.predict(noise(qwen, 0, 1), torch.tensor([500.0, 500.0]), inputs)
    assert (~inputs["prompt_embeds_mask"]).sum() == padding
    (mask,) = told
    assert mask is None if padding == 0 else torch.equal(mask, inputs["prompt_embeds_mask"])


def test_embeddings_hold_the_prompt_and_what_of_the_template_the_pipeline_keeps(loaded):
    """Qwen-Image drops the 34 tokens of its instruction, Z-Image keeps the three before a prompt."""
    for name, before in (("qwen_image", 0), ("z_image", 3)):
        backbone = loaded[name]
        mask = backbone.encode(PROMPTS).positive["prompt_embeds_mask"]
        words = [len(backbone.pipeline.tokenizer.tokenize(prompt)) for prompt in PROMPTS]
        assert words == [3, 6]
        assert mask.sum(1).tolist() == [before + count + len(SUFFIX) for count in words]
        assert mask.dtype == torch.bool


@pytest.mark.parametrize(("name", "before"), [("qwen_image", 0), ("z_image", 3)])
def test_what_is_cut_of_a_prompt_is_what_its_embedding_does_not_see(fresh, name, before):
    backbone = fresh(name, max_sequence_length=before + 4)
    first, second = "a red apple, a cat", "a red apple, a fox"  # "a", "red", "apple", "," and the rest
    (cut,) = cut_prompts(backbone, ["a red apple", first])
    assert (cut.prompt, cut.tokenizer, cut.limit, cut.removed) == (first, "tokenizer", 4, "a cat")
    embeds = backbone.encode([first, second]).positive["prompt_embeds"]
    assert embeds.shape[1] == before + 4
    assert torch.equal(embeds[0], embeds[1])


def test_prompts_longer_than_the_pipeline_or_the_positions_of_the_network_take_are_refused(fresh):
    with refused("max_sequence_length is 1025", "1024 at most"):
        fresh("qwen_image", max_sequence_length=1025)
    fresh("z_image", max_sequence_length=992)
    with refused("max_sequence_length is 993", "axes_lens 1024", "1026"):
        fresh("z_image", max_sequence_length=993)


def test_embeddings_in_place_of_prompts_are_those_of_the_prompts(backbone):
    given = backbone.encode(PROMPTS, ["a fox", None])
    embeds = dict(given.positive) | {f"negative_{name}": value for name, value in given.negative.items()}
    again = backbone.encode(None, **embeds)
    for kind in ("positive", "negative"):
        assert all(torch.equal(value, getattr(again, kind)[name]) for name, value in getattr(given, kind).items())
    without_mask = backbone.encode(None, prompt_embeds=embeds["prompt_embeds"])
    assert without_mask.positive["prompt_embeds_mask"].all()


# Guidance


def test_g_of_z_image_is_one_more_than_the_guidance_scale_of_its_pipeline(loaded):
    z_image = loaded["z_image"]
    torch.testing.assert_close(
        euler(z_image, Guidance(scale=4.0)), theirs(z_image, guidance_scale=3.0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        euler(z_image, Guidance(source="off")), theirs(z_image, guidance_scale=0.0), rtol=0, atol=1e-5
    )


def test_the_guided_prediction_of_qwen_image_keeps_the_norm_of_each_token(loaded):
    """Of one channel: the tokens are the four quarters; [1, 1] + 2 [3, -1], in two of the pixels, is (7, -1)."""
    qwen = loaded["qwen_image"]
    negative, positive = torch.zeros(2, 1, 1, 4, 4)
    negative[..., 0, :2] = torch.tensor([1.0, 1.0])
    positive[..., 0, :2] = torch.tensor([4.0, 0.0])
    positive[..., 2:, 2:] = 5.0
    negative[..., 2:, 2:] = 5.0
    positive[..., :2, 2:] = negative[..., 2:, :2] = positive[..., 2:, :2] = 1.0
    guided = qwen.guide(negative, positive, 2.0)
    expected = positive.clone()
    expected[..., 0, :2] = 4 * torch.tensor([7.0, -1.0]) / 50**0.5
    torch.testing.assert_close(guided, expected)


def test_without_a_negative_prompt_qwen_image_is_guided_by_the_empty_one(loaded):
    qwen = loaded["qwen_image"]
    expected = theirs(qwen, negative_prompt=["", ""], true_cfg_scale=4.0)
    torch.testing.assert_close(euler(qwen, Guidance(scale=4.0)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(euler(qwen, Guidance(source="off")), theirs(qwen, true_cfg_scale=1.0), rtol=0, atol=1e-5)


def test_a_guidance_scale_as_an_input_is_refused(backbone):
    with refused("embedded", type(backbone.network).__name__, "shared, full, off"):
        Denoiser(backbone=backbone, path=backbone.path(), guidance=Guidance(source="embedded"))


# Sizes, noise levels and pixels


def test_packing_is_that_of_diffusers(loaded):
    pipeline = loaded["qwen_image"].pipeline
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(packed, 6), latents)


@pytest.mark.parametrize("name", BOTH)
def test_a_shift_by_the_number_of_tokens_is_that_of_diffusers(fresh, name):
    """24×24 pixels are 36 tokens, where the shift is 0.5 + 1.5 · 20 / 48 = 1.125."""
    backbone = fresh(name)
    backbone.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=2.0
    )
    assert backbone.path(backbone.shape(24, 24)).mu == pytest.approx(1.125)
    off = {"qwen_image": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}[name]
    found = euler(backbone, Guidance(source="off"), size=24)
    torch.testing.assert_close(found, theirs(backbone, size=24, **off), rtol=0, atol=1e-5)


def test_steps_end_on_shift_terminal_and_one_step_alone_cannot():
    """diffusers stretches 1 - sigma to 1 - 0.02 at the last step, which divides 0 by 0 where sigma is 1."""
    path = NoisePath.from_scheduler(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    )
    path = replace(path, mu=0.7)
    (first, _), *_, (last, end) = path.steps(10)
    assert (first, last, end) == (1.0, pytest.approx(0.02, rel=1e-5), 0.0)
    with refused("1 sampling steps", "expected 2 or more"):
        path.steps(1)


def test_sizes_are_multiples_of_a_token_within_the_positions_of_the_network(loaded):
    qwen, z_image = loaded["qwen_image"], loaded["z_image"]
    assert (qwen.shape(), z_image.shape()) == ((4, 128, 128), (4, 512, 512))  # factor 2 where the real ones have 8
    assert qwen.shape(16, 24) == z_image.shape(16, 24) == (4, 8, 12)
    for backbone in (qwen, z_image):
        with refused("width is 18", "multiple of 4"):
            backbone.size(16, 18)
    with refused("height is 2052", "2048 at most", "axes_lens"):
        z_image.size(2052, 16)


def test_pixels_are_encoded_and_decoded_as_the_autoencoder_does(backbone):
    """Latents are scaled between the two, and the scales undo each other."""
    vae, frame = backbone.pipeline.vae, backbone_name(backbone) == "qwen_image"
    pixels = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    x = 2 * pixels - 1
    with torch.no_grad():
        z = vae.encode(x.unsqueeze(2) if frame else x).latent_dist.sample(torch.Generator().manual_seed(1))
        expected = vae.decode(z, return_dict=False)[0]
        latents = backbone.encode_pixels(pixels, torch.Generator().manual_seed(1))
        found = backbone.decode_unclamped(latents)
    assert latents.shape == (2, *backbone.shape(SIZE, SIZE))
    torch.testing.assert_close(found, expected[:, :, 0] if frame else expected, rtol=0, atol=1e-5)
    config = vae.config
    scale = z.new_tensor(config.latents_std) if frame else z.new_tensor(1 / config.scaling_factor)
    shift = z.new_tensor(config.latents_mean) if frame else z.new_tensor(config.shift_factor)
    scaled = latents * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(scaled, z[:, :, 0] if frame else z, rtol=0, atol=1e-5)


def test_images_are_those_of_diffusers_and_differentiable_in_the_latents(backbone):
    guided = {"qwen_image": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}[backbone_name(backbone)]
    common = dict(height=SIZE, width=SIZE, num_inference_steps=2, output_type="pt")
    expected = backbone.pipeline(list(PROMPTS), generator=generators(0, 1), **common, **guided).images
    latents = theirs(backbone, **guided).requires_grad_()
    pixels = backbone.decode(latents)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    pixels.sum().backward()
    assert latents.grad.abs().max() > 0
