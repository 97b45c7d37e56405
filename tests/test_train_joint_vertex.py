"""With all weight on one objective a joint run is the run of that objective: rollouts, losses and gradients."""

from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.rewards.scoring_queue import ScoringQueue
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import branching_rollout, rollout
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_joint import JointWorld, joint_settings
from tests.fixtures_training import BENT, PolicyWorld

KINDS = {"ddpo": DDPOSettings, "dpo": DPOSettings}
VERTEX = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
FIRST = dict(reward="mine", beta=0.3)


def rewards(latents):
    """Of two objectives."""
    flat = latents.flatten(1)
    return torch.stack([flat.sum(1), flat.square().sum(1)], 1)


def steps_of(name, place, weights, objectives):
    if name == "ddpo":
        return [replace(step, advantage=torch.tensor([1.5, -0.7])) for step in rollout(*place, weights).steps]

    def score(latents):
        return ScoringQueue(ahead=0).submit(lambda: rewards(latents)[:, :objectives])

    return branching_rollout(*place, weights, score_latents=score, candidates=3, margin=0.0).steps


def loss_of(algorithm, policy, sampling, steps, conditioning):
    """As an update adds it up."""
    values = []
    for step in steps:
        ((gaussian, reference),) = step_gaussians(policy, sampling, [step], conditioning)
        value = algorithm.loss(gaussian, reference, step)
        if algorithm.adds_kl:
            value = value + algorithm.beta(step.weights) * gaussian.kl(reference)
        values.append(value)
    return torch.stack(values)


def near(found, expected):
    """To 1e-6 of the largest: factors that are concatenated, and rows that share a forward, sum in another order."""
    found, expected = found.detach().double(), expected.detach().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("rule", "guidance"), [("product", "shared"), ("soup", "shared"), ("soup", "full"), ("product", "off")]
)
@pytest.mark.parametrize("name", KINDS)
def test_a_vertex_is_the_run_of_one_objective(name, guidance, rule):
    """From the same LoRA and the same generators, in float64, beside another LoRA on another schedule."""
    settings = joint_settings(KINDS[name], FIRST, dict(reward="yours"), train_rule=rule, guidance=guidance)
    joint = JointWorld(settings, schedules=[BENT, EtaSchedule(eta=0.5)], dtype=torch.float64)
    alone = PolicyWorld(guidance=guidance, schedule=BENT, dtype=torch.float64, trained=True)
    alone.policy.double()
    found, expected = steps_of(name, joint.place, VERTEX, 2), steps_of(name, alone.place, None, 1)
    for step, other in zip(found, expected, strict=True):
        drawn = {key: value for key, value in vars(other).items() if isinstance(value, torch.Tensor)}
        assert {"ddpo": {"x_s", "log_prob"}, "dpo": {"chosen", "rejected", "kept"}}[name] < set(drawn)
        for key in set(drawn) - {"weights"}:
            near(getattr(step, key), drawn[key])
    losses = loss_of(ALGORITHMS[name](settings), joint.policy, joint.sampling, found, joint.conditioning)
    wanted = loss_of(ALGORITHMS[name](KINDS[name](**FIRST)), alone.policy, alone.place[0], expected, alone.conditioning)
    near(losses, wanted)
    losses.mean().backward()
    wanted.mean().backward()
    mine = [*joint.factors("mine").values(), joint.policy.offsets_mine]
    for factor, other in zip(mine, [*alone.factors("lora_"), alone.policy.offsets], strict=True):
        assert other.grad.abs().max() > 1e-3
        near(factor.grad, other.grad)
    assert all((factor.grad == 0).all() for factor in joint.factors("yours").values())


@pytest.mark.parametrize("name", KINDS)
def test_a_schedule_of_an_objective_without_weight_has_a_gradient_of_0(name):
    """Processes that average gradients expect one of every parameter."""
    settings = joint_settings(KINDS[name], FIRST, dict(reward="yours"), train_rule="product")
    world = JointWorld(settings, schedules=[BENT, BENT])
    steps = steps_of(name, world.place, VERTEX, 2)
    loss_of(ALGORITHMS[name](settings), world.policy, world.sampling, steps, world.conditioning).mean().backward()
    assert world.policy.offsets_yours.grad.tolist() == [0, 0, 0]
    assert world.policy.offsets_mine.grad.abs().max() > 1e-3
