"""Rollouts: against diffusers' own DDIM loop, whatever the batch, at the promised number of forwards."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.noise_path import FINAL, NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.train.algorithms import DDPO
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import SharedForward, add_lora
from stepfuse.train.rollout import branching_rollout, rollout, sample_generator
from stepfuse.train.settings import DDPOSettings
from tests.fixtures_tiny import denoiser_of, prompt_embeds
from tests.fixtures_training import at_once, tiny_unet

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
SHAPE = (4, 8, 8)
G, ETA, N, K = 3.0, 0.8, 4, 3  # guidance scale, eta, steps, candidates
RANDOM_END = dict(steps_offset=1, set_alpha_to_one=False)
SURE_END = dict(steps_offset=1, set_alpha_to_one=True)


class World:
    """A base with a LoRA that matters, four prompts, and a count of its forwards."""

    def __init__(self, *, end=RANDOM_END, guidance="shared", dtype=torch.float32):
        self.unet = tiny_unet()
        add_lora(self.unet, "mine", rank=4, alpha=4, targets=["to_q", "to_k", "to_v", "to_out.0", "conv1"], seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.unet.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        self.unet.to(dtype)
        self.scheduler = DDIMScheduler(**BETAS, clip_sample=False, **end)
        path = NoisePath.from_scheduler(self.scheduler)
        self.denoiser = denoiser_of(self.unet, self.scheduler, guidance=guidance, guidance_scale=G)
        self.steps = path.steps(N)
        words = torch.randn(2, 4, 6, 32, generator=torch.Generator().manual_seed(3))
        self.conditioning = prompt_embeds(*words.to(dtype))
        self.rows = []  # of each forward
        self.unet.register_forward_hook(lambda module, inputs, output: self.rows.append(len(output[0])))

    def place(self, rows, learned=None):
        generators = [sample_generator(0, "rollout", i) for i in range(4)][rows]
        schedule, learned = EtaSchedule(eta=ETA), None if learned is None else frozenset(learned)
        sampling = Sampling(
            denoiser=self.denoiser,
            objectives=(Expert.adapter("mine", schedule),),
            steps=self.steps,
            shape=SHAPE,
            learned=learned,
        )
        return sampling, self.conditioning[rows], generators

    def rollout(self, rows=slice(0, 4), **options):
        return rollout(*self.place(rows), **options)

    def branch(self, rows=slice(0, 4), *, score=None, margin=0.0, learned=None):
        options = dict(score_latents=at_once(score or roughness), candidates=K, margin=margin)
        return branching_rollout(*self.place(rows, learned), **options)

    def guided(self, x, t):
        """The policy's prediction, worked from single forwards: e_u of the base, e_c of the adapter."""
        with torch.no_grad():
            self.unet.disable_adapters()
            negative = self.unet(x, t, self.conditioning.negative["prompt_embeds"]).sample
            self.unet.enable_adapters()
            return negative + G * (self.unet(x, t, self.conditioning.positive["prompt_embeds"]).sample - negative)


def roughness(latents):
    return (latents[..., 1:] - latents[..., :-1]).abs().mean((1, 2, 3))


# What a rollout is


@pytest.mark.parametrize("end", [RANDOM_END, SURE_END], ids=["random end", "sure end"])
def test_rollout_is_the_ddim_loop_of_diffusers(end):
    world = World(end=end)
    generators = [sample_generator(0, "rollout", i) for i in range(4)]

    def draw():
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

    scheduler = DDIMScheduler(**BETAS, clip_sample=False, **end)
    scheduler.set_timesteps(N)
    x = draw()
    visited = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(world.guided(x, t), t, x, eta=ETA, variance_noise=draw()).prev_sample
        visited.append(x)
    trajectory = world.rollout()
    torch.testing.assert_close(trajectory.latents, x, rtol=1e-4, atol=1e-4)
    for step, before, after in zip(trajectory.steps, visited[:-1], visited[1:], strict=end is RANDOM_END):
        torch.testing.assert_close(step.x_t, before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.x_s, after, rtol=1e-4, atol=1e-4)


def test_every_stored_step_starts_at_the_very_tensor_the_last_one_drew():
    trajectory = World().rollout()
    for step, following in pairwise(trajectory.steps):
        assert following.x_t is step.x_s
    assert trajectory.latents is trajectory.steps[-1].x_s


def test_log_probs_are_of_the_ddim_steps_of_diffusers():
    world = World()
    for step in world.rollout().steps:
        world.scheduler.set_timesteps(N)
        zero = torch.zeros_like(step.x_t)
        mean = world.scheduler.step(
            world.guided(step.x_t, step.t), step.t, step.x_t, eta=ETA, variance_noise=zero
        ).prev_sample
        deviation = ETA * world.scheduler._get_variance(step.t, step.t - 1000 // N).sqrt()
        expected = torch.distributions.Normal(mean, deviation).log_prob(step.x_s).sum((1, 2, 3))
        torch.testing.assert_close(step.log_prob, expected, rtol=1e-4, atol=1e-2)


def test_last_step_ends_on_the_final_alpha_of_the_scheduler():
    world = World()
    last = world.rollout().steps[-1]
    assert (last.t, last.s) == (1, FINAL)
    assert len(world.rollout().steps) == N


@pytest.mark.parametrize("kind", ["rollout", "branch"])
def test_a_deterministic_last_step_is_taken_but_not_stored(kind):
    trajectory = getattr(World(end=SURE_END), kind)()
    assert [step.t for step in trajectory.steps] == [751, 501, 251]
    assert FINAL not in [step.s for step in trajectory.steps]


def test_rollout_ends_on_the_predicted_clean_latent_where_the_last_step_is_deterministic():
    world = World(end=SURE_END)
    trajectory = world.rollout()
    x = trajectory.steps[-1].x_s
    alpha = world.scheduler.alphas_cumprod[1].sqrt()
    clean = (x - (1 - alpha**2).sqrt() * world.guided(x, 1)) / alpha
    torch.testing.assert_close(trajectory.latents, clean, rtol=1e-4, atol=1e-4)


def test_reference_is_the_guided_base():
    world = World()
    for step in world.rollout().steps:
        with torch.no_grad():
            world.unet.disable_adapters()
            negative = world.unet(step.x_t, step.t, world.conditioning.negative["prompt_embeds"]).sample
            positive = world.unet(step.x_t, step.t, world.conditioning.positive["prompt_embeds"]).sample
            world.unet.enable_adapters()
        torch.testing.assert_close(step.negative, negative, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.reference, (1 - G) * negative + G * positive, rtol=1e-5, atol=1e-5)


def test_advantages_reach_every_step():
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    trajectory = DDPO(DDPOSettings()).assign_advantages(World().rollout(), advantages)
    assert len(trajectory.steps) == N
    assert all(torch.equal(step.advantage, advantages) for step in trajectory.steps)


# However the batch is split


def test_a_batch_of_four_is_four_batches_of_one():
    world = World(dtype=torch.float64)  # rounds alike for any number of rows
    together = world.rollout()
    for i in range(4):
        alone = world.rollout(slice(i, i + 1))
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-9, atol=1e-9)
        for one, all_four in zip(alone.steps, together.steps, strict=True):
            for name in ("x_t", "x_s", "reference", "negative"):
                torch.testing.assert_close(getattr(one, name)[0], getattr(all_four, name)[i], rtol=1e-9, atol=1e-9)


def test_branching_of_four_is_branching_of_each_alone():
    world = World(dtype=torch.float64)  # rounds alike for any number of rows
    together = world.branch()
    for i in range(4):
        alone = world.branch(slice(i, i + 1))
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-9, atol=1e-9)
        for one, all_four in zip(alone.steps, together.steps, strict=True):
            for name in ("x_t", "chosen", "rejected", "reference", "negative", "kept"):
                torch.testing.assert_close(getattr(one, name)[0], getattr(all_four, name)[i], rtol=1e-9, atol=1e-9)


def test_generators_differ_by_seed_and_by_place():
    places = [(0, "rollout", 0, 0), (1, "rollout", 0, 0), (0, "rollout", 0, 1), (0, "rollout", 1, 0), (0, "prompts", 0)]
    places += [(0, "rollout", 1, 11), (0, "rollout", 11, 1)]
    seeds = [sample_generator(*place).initial_seed() for place in places]
    assert len(set(seeds)) == len(places)
    assert sample_generator(*places[0]).initial_seed() == seeds[0]


# Candidates


def test_best_and_worst_candidates_are_stored_as_they_were_scored():
    world = World()
    seen = []

    def score(latents):
        seen.append(latents.clone())
        return roughness(latents)

    trajectory = world.branch(score=score)
    assert len(trajectory.steps) == len(seen) == N
    following = [t for t, _ in world.steps[1:]]
    for number, (step, clean) in enumerate(zip(trajectory.steps, seen, strict=True)):
        assert len(clean) == 4 * K
        assert step.kept.all()
        for i, own in enumerate(clean.reshape(4, K, *SHAPE)):
            scores = [roughness(latent[None]).item() for latent in own]
            best, worst = own[scores.index(max(scores))], own[scores.index(min(scores))]
            for latent, expected in ((step.chosen, best), (step.rejected, worst)):
                if number == N - 1:  # the end of the path: the candidate is the clean latent, the same tensor
                    assert torch.equal(latent[i], expected)
                    continue
                t = following[number]  # what was scored is the clean latent that the candidate predicts
                alpha = world.scheduler.alphas_cumprod[t].sqrt()
                predicted = (latent - (1 - alpha**2).sqrt() * world.guided(latent, t)) / alpha
                torch.testing.assert_close(predicted[i], expected, rtol=1e-4, atol=1e-4)


def test_branching_goes_on_from_one_of_the_candidates_at_random():
    world = World()
    everyone = []
    for seed in range(8):
        generators = [sample_generator(seed, i) for i in range(4)]
        steps = branching_rollout(
            *world.place(slice(0, 4))[:-1],
            generators,
            score_latents=at_once(roughness),
            candidates=2,
            margin=0.0,
        ).steps
        for step, following in pairwise(steps):
            best = (following.x_t == step.chosen).flatten(1).all(1)
            worst = (following.x_t == step.rejected).flatten(1).all(1)
            assert (best ^ worst).all()  # of two candidates it is one, the very tensor
            everyone += best.tolist()
    # 96 fair coins: 48 ± 5 standard deviations of 4.9
    assert len(everyone) == 96
    assert 24 < sum(everyone) < 72


def test_margin_decides_which_pairs_are_kept():
    world = World()
    gaps = []

    def score(latents):
        values = roughness(latents)
        gaps.append(values.reshape(4, K).amax(1) - values.reshape(4, K).amin(1))
        return values

    free = world.branch(score=score)
    margin = torch.cat(gaps).median().item()
    strict = world.branch(score=score, margin=margin)
    assert torch.equal(torch.cat([step.kept for step in free.steps]), torch.cat(gaps[:N]) > 0)
    kept = torch.cat([step.kept for step in strict.steps])
    assert torch.equal(kept, torch.cat(gaps[N:]) > margin)
    assert 0 < kept.sum() < len(kept)


def test_equal_scores_keep_no_pair():
    for step in World().branch(score=lambda latents: torch.full((len(latents),), 0.1)).steps:
        assert not step.kept.any()


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_skipped_steps_have_no_candidates(skip):
    scored = []

    def score(latents):
        scored.append(len(latents))
        return roughness(latents)

    trajectory = World().branch(score=score, learned=range(skip, N))
    assert [step.t for step in trajectory.steps] == [751, 501, 251, 1][skip:]
    assert scored == [4 * K] * (N - skip)


# What it costs, in rows of the UNet


@pytest.mark.parametrize(("guidance", "rows"), [("shared", [8, 4]), ("full", [8, 8]), ("off", [4, 4])])
def test_a_step_of_a_rollout_costs_policy_and_reference(guidance, rows):
    # shared: e_u and e_c of the base in one, e_c of the policy; full: policy and base, both with their own e_u stacked
    world = World(guidance=guidance)
    world.rollout()
    assert world.rows == rows * N


@pytest.mark.parametrize(("guidance", "rows"), [("shared", [4, 4]), ("full", [8]), ("off", [4])])
def test_a_rollout_whose_loss_has_no_kl_asks_the_base_for_nothing_but_e_u(guidance, rows):
    world = World(guidance=guidance)
    steps = world.rollout(reference=False).steps
    assert world.rows == rows * N
    assert {step.reference for step in steps} == {None}


def test_a_deterministic_step_costs_no_reference():
    world = World(end=SURE_END)
    world.rollout()
    assert world.rows == [8, 4] * (N - 1) + [4, 4]


def test_a_candidate_is_predicted_once_for_its_score_and_the_next_step():
    world = World()
    world.branch()
    # e_u and e_c of 4 samples to start with; then per step those of all candidates and the reference
    # of the samples, and at the last step the reference alone.
    assert world.rows == [4, 4] + [4 * K, 4 * K, 4] * (N - 1) + [4]


def test_a_skipped_step_costs_one_prediction_a_sample():
    world = World()
    world.branch(learned=range(2, N))
    assert world.rows == [4, 4] + [4, 4] * 2 + [4 * K, 4 * K, 4] * (N - 3) + [4]


@pytest.mark.parametrize("kind", ["rollout", "branch"])
def test_the_variance_of_a_step_is_computed_once(kind, monkeypatch):
    world, times, relative = World(), [], EtaSchedule.relative

    def counted(self, path, t, s, like):
        times.append(t)
        return relative(self, path, t, s, like)

    monkeypatch.setattr(EtaSchedule, "relative", counted)
    getattr(world, kind)()
    assert times == [t for t, _ in world.steps]


@pytest.mark.parametrize("kind", ["rollout", "branch"])
def test_what_is_stored_of_a_step_keeps_no_other_latents_in_memory(kind):
    world = World()
    world.denoiser = replace(world.denoiser, batched=SharedForward(world.unet, "mine"))
    for step in getattr(world, kind)().steps:
        stored = [value for value in vars(step).values() if isinstance(value, torch.Tensor) and value.ndim == 4]
        assert len(stored) == 4 + (kind == "branch")  # x_t, e_u, e_ref, and x_s or the two candidates
        assert [value.untyped_storage().nbytes() for value in stored] == [4 * 4 * 8 * 8 * 4] * len(stored)
