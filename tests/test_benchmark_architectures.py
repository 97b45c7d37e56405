"""Benchmarks of published architectures: their commands on networks of the same kind, a few channels wide."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.objective import Objective
from stepfuse.scripts.baselines.sampling import BASELINES, denoise
from stepfuse.scripts.benchmark.architectures import ARCHITECTURES
from stepfuse.scripts.benchmark.models import random_conditioning, random_model
from stepfuse.scripts.benchmark.sampling import Bench, sampling_table
from stepfuse.scripts.benchmark.settings import SamplingBenchmark, TrainingBenchmark
from stepfuse.scripts.benchmark.training import training_table
from stepfuse.scripts.cli.main import main
from tests.fixtures_tiny import networks, refused

WIDTHS = dict(num_attention_heads=2, joint_attention_dim=16)
SIZES = dict(sample_size=8, pos_embed_max_size=8, caption_projection_dim=16)
TINY = {
    "sd35": WIDTHS | SIZES | dict(attention_head_dim=8, pooled_projection_dim=8),
    "flux": WIDTHS | dict(attention_head_dim=16, axes_dims_rope=(4, 6, 6), pooled_projection_dim=8),
    "qwen": WIDTHS | dict(attention_head_dim=16, axes_dims_rope=(4, 6, 6)),
}
SHAPES = {"prompt_embeds": (5, 16), "pooled_prompt_embeds": (8,)}
DEPTHS = {"sd35": "2 of 24 layers", "flux": "2 of 57 layers", "qwen": "2 of 60 layers"}
NO_KL = ("ddpo", "stepfuse, no KL")
SCALE = 3.0


@pytest.fixture(params=TINY)
def architecture(request, monkeypatch):
    name, published = request.param, ARCHITECTURES[request.param]
    embeds = {embed: SHAPES[embed] for embed in published.embeds}
    config = {**published.config, **TINY[name]}
    monkeypatch.setitem(ARCHITECTURES, name, replace(published, config=config, embeds=embeds))
    return name


def settings_of(architecture, **changes):
    sizes = dict(model=architecture, layers=2, height=64, width=64, images=2, steps=2, adapters=(1, 3))
    return SamplingBenchmark(**sizes | dict(repeats=1, guidance_scale=SCALE, memory=False) | changes)


def test_the_command_times_an_architecture_and_states_its_depth(architecture, tmp_path, capsys):
    output = tmp_path / "bench.json"
    what = "--layers 2 --height 64 --width 64 --adapters 1,2 --images 2 --steps 2 --repeats 1 --no_memory"
    methods = "--rules product,soup --baselines separate,set_adapters"
    main(f"benchmark --architecture {architecture} {what} {methods} --device cpu --output {output}".split())
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert sampling_table(results) in printed
    assert f"{DEPTHS[architecture]}." in printed.splitlines()
    rows = {(row["way"], row["adapters"]): row for row in results["rows"]}
    negative = int(architecture != "flux")  # which takes the scale as an input
    assert {key: row["rows_an_image"] for key, row in rows.items()} == {
        ("one adapter", 1): 1 + negative,
        ("product", 2): 2 + negative,
        ("soup", 2): 1 + negative,
        ("separate", 1): 1 + negative,
        ("separate", 2): 2 + negative,
        ("set_adapters", 1): 1 + negative,
        ("set_adapters", 2): 2 * (1 + negative),
    }
    seconds = {key: row["seconds_a_step"] for key, row in rows.items()}
    for (way, count), row in rows.items():
        assert row["ratio_to_separate"] == pytest.approx(seconds[way, count] / seconds["separate", count])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_predicts_the_average_of_what_each_adapter_predicts(architecture, baseline):
    bench = Bench(settings_of(architecture))
    denoiser = bench.sampler.denoiser
    if denoiser.guidance.subtracts:  # peft's mixed batch shares the base's e_u
        source = "shared" if baseline == "mixed_batch" else "full"
        denoiser = replace(denoiser, guidance=Guidance(source=source, scale=SCALE))
    each = denoiser.predictions(bench.x_T, 0.5, bench.conditioning, networks(*bench.adapters))
    blend, _ = BASELINES[baseline].build(bench.unbatched(), bench.copy_of, bench.adapters)
    with torch.no_grad():
        got = blend(bench.x_T, 0.5, bench.conditioning)
    torch.testing.assert_close(got, torch.stack(each).mean(0), atol=3e-5, rtol=1e-5)
    assert (each[0] - each[1]).abs().max() > 1e-4


def test_a_baseline_takes_the_steps_that_ours_takes_with_eta_0(architecture):
    bench = Bench(settings_of(architecture, steps=3))
    name, *_ = bench.adapters
    certain = Objective(name=name, reward=name, variance=EtaSchedule(eta=0.0), beta=1.0)
    guidance = bench.sampler.denoiser.guidance
    guidance = replace(guidance, source="full") if guidance.subtracts else guidance
    denoiser = replace(bench.sampler.denoiser, guidance=guidance)
    sampler = replace(bench.sampler, denoiser=denoiser, objectives=(certain,), default_weights={name: 1.0})
    generators = [torch.Generator() for _ in bench.x_T]
    with torch.no_grad():
        expected = sampler.denoise(bench.x_T, sampler.plan({name: 1.0}, 2), bench.conditioning, generators)
        blend, _ = BASELINES["set_adapters"].build(bench.unbatched(), bench.copy_of, [name])
        got = denoise(blend, denoiser.path, 3, bench.x_T, bench.conditioning)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


PUBLISHED = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd35": 2_243_171_520,
    "flux": 11_901_408_320,
    "qwen": 20_430_401_088,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_published_number_of_parameters(name):
    """As the checkpoints of Stable Diffusion 1.5, XL and 3.5 medium, FLUX.1 dev and Qwen-Image have."""
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        network = getattr(diffusers, architecture.network)(**{**architecture.config, **architecture.reduced(0)})
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name]


def test_conditioning_of_sdxl_has_its_pooled_text_and_sizes():
    """2,816 inputs are the pooled text, 1,280, and six sizes of width 256."""
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    with torch.device("meta"):  # its weights need 10 GB
        unet = diffusers.UNet2DConditionModel(**ARCHITECTURES["sdxl"].config)
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=unet, scheduler=diffusers.DDIMScheduler(), **dict.fromkeys(parts)
    )
    conditioning = random_conditioning(backbone_of(pipeline), "sdxl", 2, device=torch.device("cpu"))
    assert {name: value.shape for name, value in conditioning.positive.items()} == {
        "prompt_embeds": (2, 77, 2048),
        "text_embeds": (2, 1280),
        "time_ids": (2, 6),
    }


def test_kinds_of_layers_are_reduced_in_the_published_ratio():
    flux = ARCHITECTURES["flux"]
    assert flux.reduced(6) == {"num_layers": 2, "num_single_layers": 4}
    assert flux.reduced(0) == {"num_layers": 19, "num_single_layers": 38}
    assert all(sum(flux.reduced(layers).values()) == layers for layers in range(2, 58))
    assert ARCHITECTURES["sd35"].stated_depth(0) == "24 of 24 layers"
    assert ARCHITECTURES["sd15"].stated_depth(0) == ""


@pytest.mark.parametrize(
    ("model", "layers", "expected"),
    [
        ("sd35", 25, "layers 25; expected 1 to 24 for SD3Transformer2DModel, or 0 for all"),
        ("flux", 1, "layers 1; expected 2 to 57 for FluxTransformer2DModel, or 0 for all"),
        ("sd15", 3, "layers 3, but the depth of UNet2DConditionModel cannot be reduced; expected 0"),
        ("emoji", 3, "layers 3, but emoji has the layers of its weights; expected 0"),
    ],
)
def test_a_depth_that_cannot_be_is_refused(model, layers, expected):
    with refused(expected):
        SamplingBenchmark(model=model, layers=layers)
    if model != "flux":  # is not trained
        with refused(expected):
            TrainingBenchmark(model=model, layers=layers)


def test_an_architecture_of_no_known_family_is_refused_by_name_before_it_is_built(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "other", replace(ARCHITECTURES["qwen"], pipeline="PixArtSigmaPipeline"))
    with refused("PixArtSigmaPipeline is of no model family"):
        random_model("other", 1)


@pytest.mark.usefixtures("own_accelerator")
def test_the_command_of_training_takes_stable_diffusion_3(monkeypatch, tmp_path, capsys):
    """Of DDPO with a KL and of Flow-GRPO, by steps and images; the others' loops train UNets only.

    Ours and Flow-GRPO take two rows of both steps in the rollout. Neither learns from the last; of the first ours takes
    a row of the policy and one of the base, and Flow-GRPO two of each.
    """
    published = ARCHITECTURES["sd35"]
    tiny = TINY["sd35"] | dict(joint_attention_dim=4096, pooled_projection_dim=2048)  # of its text encoders
    monkeypatch.setitem(ARCHITECTURES, "sd35", replace(published, config={**published.config, **tiny}))
    output = tmp_path / "training.json"
    main(
        "benchmark training --model sd35 --layers 2 --resolution 64 --images 2 --steps 2 --candidates 2 --repeats 1 "
        f"--no_memory --device cpu --output {output}".split()
    )
    results = json.loads(output.read_text())
    assert results["depth"] == "2 of 24 layers"
    counted = {(row["algorithm"], row["name"]): row["rows_an_image"] for row in results["rows"]}
    assert set(counted) == {("ddpo", "Flow-GRPO"), *((each, "stepfuse") for each in ("ddpo", "dpo")), NO_KL}
    assert (counted["ddpo", "Flow-GRPO"], counted["ddpo", "stepfuse"]) == (2 * 2 + 4, 2 * 2 + 2)
    printed = capsys.readouterr().out
    assert training_table(results) in printed
    assert "ddpo-pytorch, SPO: left out, it trains UNets only." in printed
