"""Several denoising steps in one forward of the loss, base and policy in one of the rollout: the same numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepfuse.train.algorithms import DDPO, DPO
from stepfuse.train.loop import train_adapter
from stepfuse.train.lora import SharedForward
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import rollout
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import networks, read_lora, refused
from tests.fixtures_training import BENT, COMMON, ETA, PolicyWorld, Watched, forget_accelerator, two_epochs

REWARDS = """
def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))
"""


def together(world):
    """The same denoiser with base and policy in one forward."""
    return replace(world.denoiser, batched=SharedForward(world.unet, "mine"))


def together_place(world):
    sampling, *others = world.place
    return replace(sampling, denoiser=together(world)), *others


def calls(network):
    """Rows of each forward from now on."""
    rows = []
    network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    return rows


# The loss


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("schedule", [ETA, BENT], ids=["eta", "learned"])
def test_steps_of_one_forward_are_those_of_their_own(guidance, schedule):
    world = PolicyWorld(guidance=guidance, schedule=schedule, trained=True)
    steps = rollout(*world.place).steps
    trainable = [parameter for parameter in world.policy.parameters() if parameter.requires_grad]

    def gradient(gaussians):
        value = sum(g.log_prob(step.x_s).sum() + g.kl(r).sum() for (g, r), step in zip(gaussians, steps, strict=True))
        return torch.autograd.grad(value, trainable)

    alone = [world.gaussians(step) for step in steps]
    rows = calls(world.unet)
    joined = step_gaussians(world.policy, world.place[0], steps, world.conditioning)
    assert rows == [2 * 3 * (2 if guidance == "full" else 1)]
    for pair, other in zip(alone, joined, strict=True):
        for one, two in zip(pair, other, strict=True):
            torch.testing.assert_close(two.mean, one.mean, rtol=0, atol=1e-5)
            torch.testing.assert_close(two.variance, one.variance)
    for one, two in zip(gradient(alone), gradient(joined), strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


# The rollout


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
def test_a_rollout_with_base_and_policy_in_one_forward_is_the_same(guidance):
    worlds = [PolicyWorld(guidance=guidance, trained=True) for _ in range(2)]
    apart = rollout(*worlds[0].place)
    rows = calls(worlds[1].unet)
    joined = rollout(*together_place(worlds[1]))
    assert rows == [2 * {"shared": 3, "full": 4, "off": 2}[guidance]] * 3
    for one, two in zip(apart.steps, joined.steps, strict=True):
        assert (one.negative is None) == (two.negative is None) == (guidance != "shared")
        for name in ("x_t", "x_s", "reference", "negative", "log_prob"):
            if getattr(one, name) is not None:
                torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-4, atol=1e-4, msg=name)
        assert not torch.allclose(two.reference, worlds[1].gaussians(two)[0].mean, atol=1e-2)


def test_the_adapter_is_what_it_is_at_that_moment_and_afterwards_all_is_as_before():
    world = PolicyWorld(trained=True)
    x, place = torch.ones(2, 4, 8, 8), (500, world.conditioning)

    def both():
        return [world.denoiser.predictions(x, *place, networks(name))[0] for name in (None, "mine")]

    with torch.no_grad():
        base, before = both()
        for factor in world.factors("lora_B"):
            factor.mul_(-1)
        _, after = both()
        joined = together(world).predictions(x, *place, networks(None, "mine"))
        assert all(torch.equal(one, two) for one, two in zip(both(), (base, after), strict=True))
    assert (after - before).abs().max() > 0.01
    for one, two in zip((base, after), joined, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


def test_rows_in_several_forwards_are_each_their_own():
    world = PolicyWorld(trained=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = together(world).predictions(x, 500, world.conditioning, networks(None, "mine"))
        for most in (1, 4, 5):  # base alone, a border between forwards, and one within
            some = replace(together(world), rows_at_once=most)
            found = some.predictions(x, 500, world.conditioning, networks(None, "mine"))
            for one, two in zip(expected, found, strict=True):
                torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


def test_another_adapter_is_refused():
    world = PolicyWorld()
    with refused("'yours'", "expected 'mine' and the base only"):
        together(world).predictions(torch.ones(2, 4, 8, 8), 500, world.conditioning, networks("yours"))


# Whole runs


class WatchedRollout(Watched):
    """And sees that the first log-probs it starts from are near those that were drawn."""

    def __init__(self, settings):
        super().__init__(settings)
        self.drawn = []

    def assign_advantages(self, trajectory, advantages):
        self.drawn += [step.log_prob.clone() for step in trajectory.steps]
        return super().assign_advantages(trajectory, advantages)

    def loss(self, policy, reference, step):
        if len(self.ratios) < 3:
            torch.testing.assert_close(step.log_prob, self.drawn[len(self.ratios)], rtol=1e-4, atol=1e-3)
        return super().loss(policy, reference, step)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ratios_are_to_log_probs_of_the_first_update_which_are_the_rollouts(run_training, tiny_base, precision):
    settings = two_epochs(tiny_base, mixed_precision=precision, timesteps_per_forward=2)
    watched = WatchedRollout(settings)
    forget_accelerator()
    train_adapter(settings, watched)
    updates = [watched.ratios[i : i + 3] for i in range(0, 12, 3)]  # three denoising steps each
    assert updates[0] == updates[2] == [[0.0] * 4] * 3
    for update in (updates[1], updates[3]):
        assert max(abs(ratio) for step in update for ratio in step) > 1e-4


def trained(algorithm, settings):
    forget_accelerator()
    train_adapter(settings, algorithm(settings))
    return read_lora(Path(settings.output_dir) / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_a_run_trains_the_same_adapter(run_training, tiny_base, algorithm, guidance):
    kind, make = (DPO, DPOSettings) if algorithm == "dpo" else (DDPO, DDPOSettings)
    own = dict(num_generations=2, num_inner_epochs=2) if algorithm == "ddpo" else {}
    adapters = []
    for number in (1, 2):
        common = COMMON | {"output_dir": f"out-{number}", "sample_num_steps": 3, "learning_rate": 1e-3}
        adapters.append(
            trained(
                kind,
                make(
                    **common,
                    **own,
                    pretrained_model_name_or_path=str(tiny_base),
                    guidance=guidance,
                    adam_epsilon=1e-3,  # a step of AdamW that is no sign
                    max_train_steps=4,
                    timesteps_per_forward=number,
                ),
            )
        )
    apart, joined = adapters
    assert max(float(value.abs().max()) for name, value in apart.items() if "lora_B" in name or ".up." in name) > 1e-4
    for name, value in apart.items():
        torch.testing.assert_close(joined[name], value, rtol=0, atol=1e-6, msg=name)


def test_there_are_as_few_forwards_as_that(run_training, tiny_base):
    rows = {}
    for number in (1, 2):
        common = COMMON | {"output_dir": f"out-{number}", "sample_num_steps": 5, "num_validation_images": 1}
        settings = DDPOSettings(
            **common,
            pretrained_model_name_or_path=str(tiny_base),
            num_generations=2,
            max_train_steps=1,
            timesteps_per_forward=number,
        )
        rows[number] = []

        class Counting(DDPO):
            def collect(self, sampling, *arguments, seen=rows[number]):
                sampling.denoiser.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
                return super().collect(sampling, *arguments)

        trained(Counting, settings)
    one, two = ([count for count in seen if count >= 4] for seen in rows.values())  # the last are of the one sample
    assert one == [8, 4] * 5 + [4] * 5  # e_u and reference of 4 images, and the policy; then the loss
    assert two == [12] * 5 + [8, 8, 4]
