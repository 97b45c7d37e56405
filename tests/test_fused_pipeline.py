"""A set as a diffusers pipeline: the sampler's images, and a pipeline's habits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler

from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.fixtures_sampler import PROMPTS, WEIGHTS, assert_near, save_set, save_three_adapters
from tests.fixtures_tiny import LATENT, generators, refused, save_stable_diffusion, save_stable_diffusion_xl

SEEDS = (0, 1)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def set_folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("fused")
    save = save_stable_diffusion if request.param == "sd" else save_stable_diffusion_xl
    return save_set(root / "set", save_three_adapters(root, save(root / "base")))


@pytest.fixture(scope="module")
def pipe(set_folder):
    loaded = FusedPipeline.from_pretrained(set_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def expected(set_folder):
    """What the sampler draws, pixels of (b, 3, h, w)."""
    sampler = FusedSampler.from_pretrained(set_folder)
    return sampler.sample(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt", progress=False)


def test_its_images_are_the_samplers_in_every_form(pipe, expected):
    def draw(**options):
        return pipe(PROMPTS, weights=WEIGHTS, generator=generators(*SEEDS), **options)

    assert torch.equal(draw(output_type="pt").images, expected)
    array = draw(output_type="np").images
    assert array.shape == (2, 16, 16, 3)
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    (images,) = draw(return_dict=False)
    for image, pixels in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert draw(output_type="latent").images.shape == (2, *LATENT)


def test_a_batch_of_one_is_drawn_in_turn_to_the_same_images(pipe, expected):
    images = pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt", batch_size=1).images
    assert_near(images, expected)


def test_images_of_one_prompt_follow_each_other(pipe):
    a, b = pipe(
        PROMPTS, WEIGHTS, num_images_per_prompt=2, generator=generators(0, 1, 2, 3), output_type="pt"
    ).images.split(2)
    assert_near(a, pipe([PROMPTS[0]] * 2, WEIGHTS, generator=generators(0, 1), output_type="pt").images)
    assert_near(b, pipe([PROMPTS[1]] * 2, WEIGHTS, generator=generators(2, 3), output_type="pt").images)


def test_weights_may_be_of_a_prompt_or_of_an_image(pipe):
    given = [{"a": 1.0}, {"b": 1.0}]
    options = dict(num_images_per_prompt=2, output_type="pt")
    by_prompt = pipe(PROMPTS, given, generator=generators(0, 1, 2, 3), **options).images
    by_image = pipe(
        PROMPTS, [given[0], given[0], given[1], given[1]], generator=generators(0, 1, 2, 3), **options
    ).images
    assert torch.equal(by_prompt, by_image)
    alone = [
        pipe([prompt] * 2, own, generator=generators(*seeds), output_type="pt").images
        for prompt, own, seeds in zip(PROMPTS, given, ((0, 1), (2, 3)), strict=True)
    ]
    assert_near(by_prompt, torch.cat(alone))


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen = []

    def watch(given, step, t, inputs):
        assert given is pipe
        seen.append((step, t, inputs["latents"].clone()))
        return {"latents": inputs["latents"] * 0} if step == 2 else None

    images = pipe(
        PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="latent", callback_on_step_end=watch
    ).images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    scheduler = DDIMScheduler.from_config(pipe.sampler.pipeline.scheduler.config)
    scheduler.set_timesteps(len(seen))
    assert [t for _, t, _ in seen] == scheduler.timesteps.tolist()
    assert not images.any()
    plain = pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="latent").images
    assert torch.equal(seen[-1][2], plain)


def test_a_callback_can_stop_the_run(pipe):
    def stop(given, step, t, inputs):
        kept.append(inputs["latents"])
        given._interrupt = step == 1
        assert given.interrupt == (step == 1)

    kept: list[torch.Tensor] = []
    images = pipe(
        PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="latent", callback_on_step_end=stop
    ).images
    assert len(kept) == 2
    assert torch.equal(images, kept[-1])
    assert len(pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="latent").images) == 2  # whole again
    with pytest.raises(AttributeError):  # as in diffusers' pipelines
        pipe.interrupt = True


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("num_steps", "; did you mean 'num_inference_steps'"),
        ("adapter_weights", ""),
        ("widht", "; did you mean 'width'"),
    ],
)
def test_an_unknown_argument_is_named(pipe, name, told):
    with pytest.raises(TypeError, match=f"unknown argument '{name}'{told}"):
        pipe(PROMPTS, WEIGHTS, **{name: 2})


def test_an_embedding_of_another_family_is_refused_unless_it_is_none(pipe):
    with refused("prompt_embeds_mask is given", "prompt_embeds, negative_prompt_embeds"):
        pipe(PROMPTS, WEIGHTS, prompt_embeds_mask=torch.ones(2, 3))
    assert len(pipe(PROMPTS, WEIGHTS, prompt_embeds_mask=None, output_type="latent").images) == 2


FAULTY_RULES = """
from stepfuse import FusionRule

class NoMethod(FusionRule):
    pass

class OnlyNetworks(FusionRule):
    def networks(self, step):
        return []

class ReturnsATensor(FusionRule):
    def fuse(self, step):
        return step.x_t

class Fails(FusionRule):
    def fuse(self, step):
        return step.nothing

class FailsBefore(FusionRule):
    def prepare(self, plan):
        return plan.nothing

    def fuse(self, step):
        return step.gaussian(step.plan.base)

class Refuses(FusionRule):
    def fuse(self, step):
        raise ValueError("only on Mondays")
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NoMethod", "the rule 'NoMethod' has no method `fuse`; expected `fuse`, or `networks` and `combine`"),
        ("OnlyNetworks", "the rule 'OnlyNetworks' has no method `fuse`"),
        ("ReturnsATensor", "the rule 'ReturnsATensor' returned a Tensor for a step; expected a Gaussian"),
        ("Fails", "the rule 'Fails': AttributeError: 'FusionStep' object has no attribute 'nothing' (mine.py,"),
        ("FailsBefore", "the rule 'FailsBefore': AttributeError: 'Plan' object has no attribute 'nothing'"),
        ("Refuses", "the rule 'Refuses': only on Mondays (mine.py, line 28)"),
    ],
)
def test_a_faulty_rule_of_ones_own_is_one_line_that_names_it(pipe, tmp_path, name, told):
    (tmp_path / "mine.py").write_text(FAULTY_RULES)
    with refused(told):
        pipe(PROMPTS, WEIGHTS, rule=f"{tmp_path}/mine.py:{name}")


def test_guidance_steps_and_rule_may_be_of_one_call(pipe, set_folder):
    options = dict(guidance="full", guidance_scale=2.0, rule="average_noise")
    sampler = FusedSampler.from_pretrained(set_folder, **options)
    drawn = sampler.sample(
        PROMPTS, WEIGHTS, generator=generators(*SEEDS), num_inference_steps=2, output_type="pt", progress=False
    )
    given = dict(generator=generators(*SEEDS), num_inference_steps=2, output_type="pt")
    assert torch.equal(pipe(PROMPTS, WEIGHTS, **given, **options).images, drawn)


def test_it_can_be_loaded_in_half_precision_or_cast(set_folder, expected):
    loaded = FusedPipeline.from_pretrained(set_folder, torch_dtype=torch.bfloat16)
    cast = FusedPipeline.from_pretrained(set_folder).to(torch.bfloat16)
    for pipe in (loaded, cast):
        assert pipe.dtype == torch.bfloat16
        rounded = pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt").images
        assert 0 < (rounded - expected).abs().mean() < 0.05
    assert cast.to(torch.float32).dtype == torch.float32


def test_models_may_lie_elsewhere_until_they_compute(set_folder, expected):
    """What `enable_model_cpu_offload` puts in place, which itself asks for an accelerator."""
    pipe = FusedPipeline.from_pretrained(set_folder)
    with pytest.raises(RuntimeError, match="accelerator"):
        pipe.enable_model_cpu_offload()
    hooks = [
        cpu_offload_with_hook(model, torch.device("cpu"))[1]
        for model in pipe.components.values()
        if isinstance(model, torch.nn.Module)
    ]
    assert torch.equal(pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt").images, expected)
    for hook in hooks:
        hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_it_draws_the_same(set_folder, offload):
    def draw(pipe):
        return pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt").images

    whole, parts = FusedPipeline.from_pretrained(set_folder).to("cuda"), FusedPipeline.from_pretrained(set_folder)
    getattr(parts, offload)()
    assert_near(draw(parts), draw(whole))


def test_a_base_already_loaded_is_taken(set_folder, expected):
    """And its own pipeline draws with it as before, adapters off."""
    base = FusedSampler.from_pretrained(set_folder).pipeline
    fresh = type(base).from_pretrained(set_folder.parent / "base")
    pipe = FusedPipeline.from_pretrained(set_folder, pipeline=fresh)
    assert pipe.components["unet"] is fresh.unet
    assert torch.equal(pipe(PROMPTS, WEIGHTS, generator=generators(*SEEDS), output_type="pt").images, expected)
    assert pipe.names == ["a", "b", "c"]
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (dict(output_type="jpg"), "'jpg'"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt 0"),
        (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "'prompt_embeds'"),
        (dict(guidance="both"), "'both'"),
        (dict(rule="sum"), "'sum'"),
        (dict(weights={"d": 1.0}), "'d'"),
        (dict(weights=[{"a": 1.0}] * 3), "3"),
        (dict(weights=[0.5, 0.5]), "'a': 0.33"),
        (dict(weights=0.5), "'a': 0.33"),
        (dict(latents=torch.zeros(2, 4, 8, 9)), "(2, 4, 8, 8)"),
        (dict(prompt_embeds=torch.zeros(2, 16, 32)), "both prompt and prompt_embeds"),
        (dict(negative_prompt="x", negative_prompt_embeds=torch.zeros(2, 16, 32)), "both negative_prompt"),
        (dict(negative_prompt=["x"] * 3), "3 negative prompts"),
        (dict(height=17), "height is 17"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_named(pipe, options, culprit, unchecked):
    with refused(culprit):
        pipe(PROMPTS, **options)


# Latents and embeddings


def own_pipeline(pipe, adapter):
    """diffusers' pipeline on the same networks, with one adapter."""
    plain = pipe.sampler.pipeline
    plain.set_progress_bar_config(disable=True)
    plain.unet.set_adapter(adapter)
    return plain


def test_latents_are_what_denoising_begins_with_as_in_diffusers(pipe):
    """The generators then draw the noise of the steps alone. Adapter b has eta 0.7."""
    latents = torch.randn(2, *LATENT, generator=generators(5)[0])
    options = dict(latents=latents, generator=generators(*SEEDS), guidance_scale=3.0, output_type="latent")
    got = pipe(PROMPTS, {"b": 1.0}, guidance="full", **options).images
    plain = own_pipeline(pipe, "b")
    expected = plain(PROMPTS, num_inference_steps=3, eta=0.7, **options | dict(generator=generators(*SEEDS))).images
    assert_near(got, expected)


@pytest.mark.parametrize("given", [True, False], ids=["latents", "no latents"])
def test_a_single_generator_draws_for_a_single_image_what_it_draws_in_diffusers(pipe, given):
    (generator,) = generators(7)
    options = dict(guidance_scale=3.0, output_type="latent")
    if given:
        options["latents"] = torch.randn(1, *LATENT, generator=generators(5)[0])
    got = pipe(PROMPTS[0], {"b": 1.0}, guidance="full", generator=generator, **options).images
    plain = own_pipeline(pipe, "b")
    expected = plain(PROMPTS[0], num_inference_steps=3, eta=0.7, generator=generators(7)[0], **options).images
    assert_near(got, expected)


def embeddings(pipe, prompts, negatives):
    """By diffusers, under the names that its pipelines take them by."""
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = pipe.sampler.pipeline.encode_prompt(
        prompt=prompts,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negatives,
    )
    return dict(zip(names, given, strict=False))


@pytest.mark.parametrize("negatives", [None, ["a dog", "a cat"]])
def test_embeddings_in_place_of_prompts_give_the_same_images(pipe, negatives):
    options = dict(weights=WEIGHTS, output_type="pt", num_images_per_prompt=2)
    by_prompt = pipe(PROMPTS, negative_prompt=negatives, generator=generators(0, 1, 2, 3), **options).images
    given = embeddings(pipe, PROMPTS, negatives)
    assert_near(pipe(**given, generator=generators(0, 1, 2, 3), **options).images, by_prompt)
    alone = {name: value for name, value in given.items() if "negative" not in name}
    rest = pipe(**alone, negative_prompt=negatives, generator=generators(0, 1, 2, 3), **options).images
    assert_near(rest, by_prompt)
    negative = {name: value for name, value in given.items() if "negative" in name}
    other = pipe(PROMPTS, **negative, generator=generators(0, 1, 2, 3), **options).images
    assert_near(other, by_prompt)


def test_incomplete_embeddings_are_refused(pipe):
    given = embeddings(pipe, PROMPTS, None)
    with refused("prompt"):
        pipe()
    wrong = {"pooled_prompt_embeds": torch.zeros(2, 24)}
    if len(given) == 4:
        given.pop("pooled_prompt_embeds")
        wrong = {}
    with refused("pooled_prompt_embeds"):
        pipe(**given | wrong)


def test_embeddings_that_the_family_does_not_take_or_that_lack_their_pair_are_named(pipe):
    given = embeddings(pipe, PROMPTS, None)
    if len(given) == 4:
        given.pop("negative_prompt_embeds")
        with refused("negative_pooled_prompt_embeds is given and negative_prompt_embeds is not"):
            pipe(**given)
    else:
        with refused("pooled_prompt_embeds is given", "prompt_embeds, negative_prompt_embeds"):
            pipe(**given, pooled_prompt_embeds=torch.zeros(2, 24))


def test_without_text_encoders_embeddings_are_drawn(pipe, set_folder):
    given = embeddings(pipe, PROMPTS, ["a dog", "a cat"])
    parts = {name: None for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))}
    base = type(pipe.sampler.pipeline).from_pretrained(set_folder.parent / "base", **parts)
    alone = FusedPipeline.from_pretrained(set_folder, pipeline=base)
    alone.set_progress_bar_config(disable=True)
    options = dict(weights=WEIGHTS, output_type="pt")
    got = alone(**given, generator=generators(*SEEDS), **options).images
    assert torch.equal(got, pipe(**given, generator=generators(*SEEDS), **options).images)
    with refused("tokenizer", "prompt_embeds"):
        alone(PROMPTS, **options)


# Saving and showing


def test_a_saved_pipeline_draws_the_same_images(set_folder, tmp_path):
    pipe = FusedPipeline.from_pretrained(set_folder, rule="average_noise", guidance="full", guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "saved")
    again = FusedPipeline.from_pretrained(tmp_path / "saved")
    drawn = [p(PROMPTS, generator=generators(*SEEDS), output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*drawn)
    plain = FusedPipeline.from_pretrained(set_folder)(PROMPTS, generator=generators(*SEEDS), output_type="pt").images
    assert not torch.equal(drawn[0], plain)
    with refused("saved", "overwrite"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "saved", overwrite=True)


def test_what_no_set_holds_is_not_saved(pipe, tmp_path):
    with refused("gate=0.5"):
        FusedPipeline(pipe.sampler.with_rule(Product(gate=0.5)), pipe.adapter_set).save_pretrained(tmp_path / "a")
    with refused("from_pretrained"):
        FusedPipeline(pipe.sampler).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_it_shows_what_it_is_made_of(pipe, set_folder):
    shown = repr(pipe)
    for part in (str(set_folder.parent / "base"), "a=0.333", "Product", "shared 3", "cpu", "float32"):
        assert part in shown


def test_loading_the_embedded_base_prints_nothing():
    """In a process of its own, since libraries warn once."""
    code = "from stepfuse.fuse.sampling.pipeline import FusedPipeline; FusedPipeline.from_pretrained('emoji')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
