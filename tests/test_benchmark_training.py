"""The benchmark of training: that the restated loops compute what they are called, and what it counts and keeps."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler
from peft import LoraConfig
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepfuse.fuse.denoiser import Denoiser
from stepfuse.fuse.path import STABLE_DIFFUSION, NoisePath
from stepfuse.fuse.pipeline import decode_latents, encode_prompts, latent_shape, load_pipeline
from stepfuse.fuse.transition import transition
from stepfuse.fuse.variance import EtaSchedule, step_variance
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.scripts.benchmark import pipelines, training
from stepfuse.scripts.benchmark.ddpo_pytorch import DDPOPyTorch, ddpo_pytorch_loss
from stepfuse.scripts.benchmark.loops import Task, ddim_step, mean_log_prob
from stepfuse.scripts.benchmark.pipelines import with_own_unet
from stepfuse.scripts.benchmark.spo import SPO, extremes, spo_loss
from stepfuse.scripts.benchmark.training import benchmark_training, memory_of, training_table
from stepfuse.scripts.benchmark.training_ways import Row, TrainingBenchmark, rows_of
from stepfuse.scripts.main import main
from stepfuse.train.lora import Policy, step_gaussians
from stepfuse.train.losses import ddpo_loss, dpo_loss
from stepfuse.train.rollout import PairedStep, SampledStep
from tests.fixtures_tiny import refused, save_stable_diffusion_xl
from tests.fixtures_training import forget_accelerator, save_tiny_pipeline

IMAGES, STEPS, CANDIDATES = 3, 5, 2
SKIPPED = 1  # a fifth of the steps


@pytest.fixture(autouse=True)
def _own_accelerator_and_chance():
    forget_accelerator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    forget_accelerator()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    save_tiny_pipeline(folder)
    return load_pipeline(str(folder))


@pytest.fixture
def task(base):
    return Task(
        pipeline=with_own_unet(base),
        accelerator=Accelerator(cpu=True),
        reward=colourfulness,
        prompts=["a red apple", "a cat"],
        images=IMAGES,
        steps=STEPS,
    )


@pytest.fixture(scope="module")
def settings():
    return TrainingBenchmark(images=IMAGES, steps=STEPS, candidates=CANDIDATES, repeats=2, memory=False)


def not_the_base(loop, size):
    """Give a loop's LoRA factors that are not zero; how large they are says how far its policy is from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loop.trainable:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def gradients(loop):
    found = [parameter.grad.clone() for parameter in loop.trainable]
    for parameter in loop.trainable:
        parameter.grad = None
    assert any(bool((gradient.abs() > 1e-6).any()) for gradient in found)
    return found


def gaussians(loop, step, conditioning):
    """Policy and reference of a step as ours has them, where each guides itself."""
    denoiser = Denoiser.from_pipeline(loop.pipeline, guidance="full", guidance_scale=loop.task.guidance_scale)
    policy = Policy(loop.unet, "rival", EtaSchedule(eta=1.0))
    (base,) = denoiser.predictions(step.x_t, step.t, conditioning, [None])
    step = replace(step, reference=base.detach())
    (both,) = step_gaussians(policy, denoiser, EtaSchedule(eta=1.0), [step], conditioning)
    return both


# The restated loops.


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_ddim_step_and_its_log_prob_are_ours_divided_by_the_dimension(kind):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    path = NoisePath.from_scheduler(scheduler)
    x_t, prediction, x_s = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for t, s in path.steps(STEPS):
        gaussian = transition(path, x_t, prediction, t, s, step_variance(EtaSchedule(), path, t, s, x_t))
        x_0, mean, deviation = ddim_step(scheduler, prediction, torch.tensor([t, t]), x_t)
        assert_close(x_0, path.clean_and_noise(x_t, prediction, t)[0])
        assert_close(mean, gaussian.mean, atol=1e-5, rtol=1e-4)
        assert_close(mean_log_prob(x_s, mean, deviation), gaussian.log_prob(x_s) / 256, atol=1e-4, rtol=1e-3)


def test_the_gradient_of_ddpo_pytorch_is_that_of_our_loss_with_full_guidance(task):
    loop = DDPOPyTorch(task)
    not_the_base(loop, 0.05)
    samples = loop.rollout()
    shift = torch.linspace(-3e-4, 3e-4, IMAGES)[:, None]  # some ratios are clipped, which are within 1e-4 of 1
    samples = replace(samples, log_prob=samples.log_prob + shift, advantage=torch.tensor([1.0, -7.0, 0.5]))
    loop.learn(samples)
    theirs = gradients(loop)
    for place, (t, s) in enumerate(NoisePath.from_scheduler(loop.scheduler).steps(STEPS)):
        assert (samples.times[:, place] == t).all()
        x_t, x_s, old = samples.x_t[:, place], samples.x_s[:, place], samples.log_prob[:, place]
        step = SampledStep(x_t=x_t, t=t, s=s, negative=None, reference=x_t, x_s=x_s, log_prob=old)
        policy, _ = gaussians(loop, step, samples.conditioning)
        advantage = samples.advantage.clamp(-5, 5)
        values = ddpo_loss(policy.log_prob(x_s) / x_t[0].numel(), old, advantage, clip_range=1e-4)
        (values.mean() / STEPS).backward()
    for own, their in zip(gradients(loop), theirs, strict=True):
        assert_close(own, their, atol=1e-7, rtol=1e-3)


def test_the_gradient_of_spo_is_that_of_our_loss_with_full_guidance_within_its_clip(task):
    loop = SPO(task, candidates=CANDIDATES, skip_first_steps=SKIPPED)
    not_the_base(loop, 0.02)
    pairs = loop.rollout()
    assert len(pairs.times) == IMAGES * (STEPS - SKIPPED)
    loop.learn(pairs)
    theirs = gradients(loop)
    for t, s in NoisePath.from_scheduler(loop.scheduler).steps(STEPS)[SKIPPED:]:
        part = pairs[pairs.times == t]
        own = dict(x_t=part.x_t, chosen=part.winner, rejected=part.loser, kept=torch.ones_like(part.times).bool())
        step = PairedStep(**own, t=t, s=s, negative=None, reference=part.x_t)
        policy, reference = gaussians(loop, step, part.conditioning)
        logs = [g.log_prob(x) / 256 for g in (policy, reference) for x in (part.winner, part.loser)]
        ratios = [own - base for own, base in zip(logs[:2], logs[2:], strict=True)]
        assert all(bool((ratio.abs() < math.log(1.1)).all()) for ratio in ratios)  # none is clipped
        (dpo_loss(*logs, beta=10.0).sum() / len(pairs.times)).backward()
    for own, their in zip(gradients(loop), theirs, strict=True):
        assert_close(own, their, atol=1e-7, rtol=1e-3)


def test_spo_clips_each_ratio_by_itself():
    """log r of +0.5 and -0.5 become log 1.1 and log 0.9: -log σ(10 (log 1.1 - log 0.9))."""
    zero, half = torch.zeros(1), torch.full((1,), 0.5)
    wanted = math.log(1 + math.exp(-10 * (math.log(1.1) - math.log(0.9))))
    assert spo_loss(half, zero, -half, zero).item() == pytest.approx(wanted)


def test_ddpo_pytorch_takes_the_worse_of_both_ratios():
    """A = 2, 9 (5 within ±5) and -1 with ratios e^0.1: -2.0002, -5.0005 and 1 e^0.1."""
    log_prob, advantage = torch.full((3,), 0.1), torch.tensor([2.0, 9.0, -1.0])
    wanted = (-2 * 1.0001 - 5 * 1.0001 + math.exp(0.1)) / 3
    assert ddpo_pytorch_loss(log_prob, torch.zeros(3), advantage).item() == pytest.approx(wanted)


def test_winner_and_loser_are_the_highest_and_lowest_and_ties_are_dropped():
    rewards = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 6.5, 2.0]])  # candidates, images
    best, worst, kept = extremes(rewards, 0.0)
    assert (best.tolist()[:2], worst.tolist()[:2]) == ([1, 2], [0, 1])
    assert kept.tolist() == [True, True, False]
    assert extremes(rewards, 2.0)[2].tolist() == [False, True, False]


def test_the_reward_says_which_candidate_of_spo_wins(task):
    """Of the last step, whose candidates are scored as they are; earlier ones by the x_0 predicted from them."""
    scored = []

    def reward(pixels, prompts):
        scored.append(colourfulness(pixels, prompts))
        return scored[-1]

    loop = SPO(replace(task, reward=reward), candidates=3, skip_first_steps=SKIPPED)
    pairs = loop.rollout()
    assert [len(values) for values in scored] == [3 * IMAGES] * (STEPS - SKIPPED)
    last = pairs[pairs.times == pairs.times.min()]
    for latents, extreme in ((last.winner, torch.amax), (last.loser, torch.amin)):
        with torch.no_grad():
            found = colourfulness(decode_latents(loop.pipeline, latents), [])
        assert_close(found, extreme(scored[-1].reshape(3, IMAGES), 0))


def test_a_reward_that_is_one_for_all_leaves_spo_nothing_to_learn_from(task):
    loop = SPO(replace(task, reward=lambda pixels, prompts: torch.zeros(len(pixels))), candidates=2)
    with refused("one reward"):
        loop.learn(loop.rollout())


@pytest.mark.parametrize("save", [save_tiny_pipeline, save_stable_diffusion_xl])
def test_prompts_are_embedded_as_the_pipeline_does_it(task, tmp_path, save):
    save(tmp_path / "base")
    pipeline = load_pipeline(str(tmp_path / "base"))
    loop = SPO(replace(task, pipeline=pipeline), candidates=2, skip_first_steps=SKIPPED)
    prompts, found, x_T = loop.begin()
    wanted = encode_prompts(pipeline, prompts, [""] * IMAGES)
    assert_close(vars(found), vars(wanted))
    assert x_T.shape == (IMAGES, *latent_shape(pipeline, None, None))
    loop.step()


def test_an_optimiser_step_moves_the_lora_alone(task, base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    for loop in (DDPOPyTorch(task), SPO(replace(task, pipeline=with_own_unet(base)), skip_first_steps=SKIPPED)):
        start = [parameter.clone() for parameter in loop.trainable]
        loop.step()
        assert any(not torch.equal(a, b) for a, b in zip(start, loop.trainable, strict=True))
        loop.close()
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_spo_holds_a_second_unet_and_ddpo_pytorch_none(task, base):
    spo = SPO(task)
    trained, reference = ({p.data_ptr() for p in network.parameters()} for network in spo.networks)
    assert not trained & reference
    assert_close(dict(spo.reference.named_parameters()), dict(base.unet.named_parameters()))
    loop = DDPOPyTorch(replace(task, pipeline=with_own_unet(base)))
    assert loop.networks == (loop.unet,)
    loop.close()


# Models.


def test_a_unet_of_its_own_shares_frozen_weights_and_keeps_its_lora_to_itself(base):
    one = with_own_unet(base)
    pointers = {parameter.data_ptr() for parameter in base.unet.parameters()}
    assert {parameter.data_ptr() for parameter in one.unet.parameters()} == pointers
    one.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert not any("lora" in name for name, _ in base.unet.named_parameters())
    assert one.vae is base.vae


def test_a_pipeline_of_random_weights_has_the_published_numbers_of_parameters():
    """Of the autoencoder 83,653,863; of the text encoders 123,060,480 and, of XL, 694,659,840 beside it."""
    with torch.device("meta"):
        parts = [
            *(AutoencoderKL(**pipelines.AUTOENCODER, **own) for own in pipelines.OWN_AUTOENCODER.values()),
            CLIPTextModel(CLIPTextConfig(**pipelines.TEXT_ENCODER)),
            CLIPTextModelWithProjection(CLIPTextConfig(**pipelines.SECOND_TEXT_ENCODER)),
        ]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [83_653_863, 83_653_863, 123_060_480, 694_659_840]


# What is measured.


@pytest.fixture(scope="module")
def results(base, settings):
    """Of the small pipeline in the place of any model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "base_pipeline", lambda settings: base)
        forget_accelerator()
        return benchmark_training(replace(settings, timestep_fraction=0.4), progress=False)


def test_rows_through_unets_are_counted_not_said(results):
    """Of an image, with T steps, k candidates and none in the first m steps: all, and those with a gradient.

    ddpo-pytorch: 2 a step, and 2 a learned step with gradient. Ours: 2 a step, of the base and of the policy, 1 for the
    reference of a learned step where the loss has a KL, and 1 a learned step with gradient.
    SPO: 2 at each of the first m + 1 steps, 2 k at those after them, and for a pair 4 of the policy and 4 of the
    reference. Ours draws as SPO does; for a pair 1 of the base and 1 of the policy.
    """
    T, k, m = STEPS, CANDIDATES, SKIPPED
    drawn = 2 * (m + 1) + 2 * k * (T - m - 1)
    counted = {
        (row["algorithm"], row["name"]): (row["rows_an_image"], row["gradient_rows_an_image"])
        for row in results["rows"]
    }
    counted.pop(("dpo", "stepfuse, 0.4 of the steps"))  # depends on which steps are drawn
    assert counted == {
        ("ddpo", "ddpo-pytorch"): (2 * T + 2 * T, 2 * T),
        ("ddpo", "stepfuse"): (3 * T + T, T),
        ("ddpo", "stepfuse, no KL"): (2 * T + T, T),
        ("ddpo", "ddpo-pytorch, 0.4 of the steps"): (2 * T + 2 * 2, 2 * 2),
        ("ddpo", "stepfuse, 0.4 of the steps"): (2 * T + 2 + 2, 2),
        ("dpo", "SPO"): (drawn + 8 * (T - m), 4 * (T - m)),
        ("dpo", "stepfuse"): (drawn + 2 * (T - m), T - m),
    }


def test_ratios_are_of_the_same_round_and_their_median_lies_within_their_range(results):
    rows = {(row["algorithm"], row["name"]): row for row in results["rows"]}
    rival = rows["dpo", "SPO"]["seconds"]
    own = rows["dpo", "stepfuse"]
    ratios = [a / b for a, b in zip(rival, own["seconds"], strict=True)]
    assert len(ratios) == 2
    assert (own["ratio"], own["ratio_min"], own["ratio_max"]) == (sum(ratios) / 2, min(ratios), max(ratios))
    assert own["images_per_second"] == pytest.approx(2 * IMAGES / sum(own["seconds"]))
    assert {rows[key]["ratio"] for key in (("dpo", "SPO"), ("ddpo", "ddpo-pytorch"))} == {1}


def test_results_say_what_they_are_of(results):
    assert torch.__version__ in results["machine"]
    assert results["libraries"]["torch"] == torch.__version__
    assert results["settings"]["skip_first_steps"] == SKIPPED
    assert results["skipped"] == {}
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(results))


def test_the_table_has_a_line_a_row(results):
    lines = training_table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"])
    (row,) = [row for row in results["rows"] if row["name"] == "SPO"]
    assert lines[2 + results["rows"].index(row)].startswith(f"| dpo | SPO | {row['images_per_second']:.3g} | 1.00 | ")
    assert lines[-1].endswith("| – |")  # no memory


def test_what_does_not_fit_is_left_out_and_said(base, settings, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(training, "free_memory", lambda device: 1e3)
    monkeypatch.setattr(DDPOPyTorch, "learn", full)
    measured = benchmark_training(replace(settings, steps=2, repeats=1), progress=False)
    assert [(row["way"], row["ratio"]) for row in measured["rows"]] == [("stepfuse", None)] * 3
    assert measured["skipped"]["ddpo, ddpo-pytorch"] == "out of memory"
    assert "dpo, SPO: left out, a second UNet of 0.0 GB" in training_table(measured)


def test_another_error_is_no_matter_of_memory(base, settings, monkeypatch):
    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(DDPOPyTorch, "learn", lambda self, samples: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        benchmark_training(replace(settings, steps=2, repeats=1), progress=False)


def test_rows_are_the_rival_and_ours_and_what_else_is_asked_for(settings):
    rows = rows_of(replace(settings, timestep_fraction=0.5, timesteps_per_forward=2, compile="regional"))
    assert [str(row) for row in rows] == [
        "ddpo, ddpo-pytorch",
        "ddpo, stepfuse",
        "ddpo, stepfuse, no KL",
        "ddpo, stepfuse, 2 steps a forward",
        "ddpo, stepfuse, no KL, 2 steps a forward",
        "ddpo, ddpo-pytorch, 0.5 of the steps",
        "ddpo, stepfuse, 0.5 of the steps, 2 steps a forward",
        "ddpo, stepfuse, regional compile",
        "dpo, SPO",
        "dpo, stepfuse",
        "dpo, stepfuse, 2 steps a forward",
        "dpo, stepfuse, 0.5 of the steps, 2 steps a forward",
        "dpo, stepfuse, regional compile",
    ]


def test_a_compiled_row_takes_its_count_from_the_one_that_is_not(base, settings):
    eager, compiled = Row("ddpo", "stepfuse"), Row("ddpo", "stepfuse", compile="full")
    way = SimpleNamespace(step=lambda: None, networks=())
    assert training._rows_of_networks(compiled, way, {eager: (20, 5)}) == (20, 5)


def test_one_image_and_half_precision_can_be_measured(base, settings, monkeypatch):
    half = load_pipeline(base.name_or_path, dtype=torch.bfloat16)
    monkeypatch.setattr(training, "base_pipeline", lambda settings: half)
    one = replace(settings, images=1, steps=2, repeats=1, dtype="bfloat16", gradient_checkpointing=True)
    assert len(benchmark_training(one, progress=False)["rows"]) == 5


def test_memory_is_of_a_process_of_its_own_and_reported_after_the_times(base, settings, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(training, "rows_of", lambda settings: [Row("ddpo", "ddpo-pytorch")])  # seconds each
    small = replace(settings, images=1, steps=1, repeats=1, memory=True)
    benchmark_training(small, progress=False, report=lambda r: seen.append(r["rows"][0]["peak_memory_mb"]))
    assert seen[0] is None
    assert seen[1] > 50  # MB, of the embedded base: the other process knows no other


def test_training_by_the_benchmark_leaves_nothing_behind(base, settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "base_pipeline", lambda settings: with_own_unet(base))
    for row in rows_of(settings):
        forget_accelerator()
        assert memory_of(replace(settings, steps=2), row) > 0
    assert list(tmp_path.iterdir()) == []


# The command.


def test_the_command_writes_the_results_and_prints_the_table(tmp_path, capsys):
    output = tmp_path / "new" / "training.json"
    small = "--algorithms dpo --images 1 --steps 2 --candidates 2 --repeats 1 --no_memory"
    main(f"benchmark training {small} --device cpu --output {output}".split())
    results = json.loads(output.read_text())
    assert training_table(results) in capsys.readouterr().out
    assert (results["settings"]["model"], results["settings"]["candidates"]) == ("emoji", 2)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ("--model sd3", "'sd3'"),
        ("--algorithms grpo", "'grpo'"),
        ("--algorithms ,", "none"),
        ("--images 0", "images 0"),
        ("--steps 0", "steps 0"),
        ("--repeats 0", "repeats 0"),
        ("--candidates 1", "candidates 1"),
        ("--threads 0", "threads 0"),
        ("--timestep_fraction 0", "timestep_fraction 0"),
        ("--timesteps_per_forward 0", "timesteps_per_forward 0"),
        ("--dtype float16", "float16"),
        ("--resolution 100", "100"),
        ("--steps 2000", "2000"),
    ],
)
def test_what_cannot_be_measured_is_named_and_nothing_is_written(tmp_path, options, culprit):
    output = tmp_path / "training.json"
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "training", *options.split(), "--device", "cpu", "--output", str(output)])
    assert re.fullmatch(r"error: [^\n]+", str(stop.value.code))
    assert culprit in stop.value.code
    assert not output.exists()


def test_results_that_are_there_are_kept(tmp_path):
    output = tmp_path / "training.json"
    output.write_text("mine")
    with pytest.raises(SystemExit, match="exists"):
        main(["benchmark", "training", "--output", str(output)])
    assert output.read_text() == "mine"
