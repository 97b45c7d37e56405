"""The Gaussians of stored denoising steps, with gradients: what every loss is computed from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.diffusion.gaussian import Gaussian, at_least_float32
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.train.fused_sampling import Sampling, fusion_step
from stepfuse.train.rollout import Step

POLICY = Network.of("policy")  # stands for the policy among the branches of guidance


def step_gaussians(
    policy: nn.Module, sampling: Sampling, steps: Sequence[Step], conditioning: Conditioning
) -> list[tuple[Gaussian, Gaussian | None]]:
    """p_θ(x_s | x_t) of the fused policy, with gradients, and p_ref(x_s | x_t), of stored steps of one batch.

    All of them are computed in one forward pass.

    Args:
        policy: the `Policy`, wrapped or not.
        sampling: with the initial schedules, whose parameters come from the policy.
        steps: one or more steps of one batch; p_ref is None for those without the base's prediction.
    """
    guidance = sampling.denoiser.guidance
    kinds = "".join(branch.kind for branch in guidance.branches([POLICY]) if branch.network == POLICY)
    asked = [_Asked(fusion_step(sampling.plan(step.weights), step.index, step.x_t), sampling.rule) for step in steps]
    outputs, parameters = _forward(policy, sampling, asked, kinds, conditioning)
    current = sampling.with_schedules(parameters)
    sizes = [len(rows) for each in asked for rows in each.rows] * len(kinds)
    parts = iter(at_least_float32(output) for output in outputs.split(sizes))
    by_kind = [[[next(parts) for _ in each.rows] for each in asked] for _ in kinds]
    gaussians: list[tuple[Gaussian, Gaussian | None]] = []
    for k, (step, each) in enumerate(zip(steps, asked, strict=True)):
        stored = [] if step.negative is None else [step.negative]  # the base's; the others are the policy's
        branches = guidance.branches(each.networks, each.some)
        raw = [*stored, *(output for kind in by_kind for output in kind[k])]
        predictions = sampling.denoiser.combine(branches, raw)
        fusion = fusion_step(current.plan(step.weights, tabulated=False), step.index, step.x_t)
        spread = [fusion.spread(e, some) for e, some in zip(predictions, each.some, strict=True)]
        reference = None if step.reference is None else current.reference(fusion, step.reference)
        gaussians.append((current.rule.combine(fusion, spread), reference))
    return gaussians


class _Asked:
    """The networks that a rule asks for at a step, each with its rows, `some` of them None for all."""

    def __init__(self, step: FusionStep, rule: FusionRule) -> None:
        self.step = step
        self.networks, self.rows = zip(*rule.networks(step), strict=True)
        self.some = [step.some_rows(rows) for rows in self.rows]


def _forward(
    policy: nn.Module, sampling: Sampling, asked: Sequence[_Asked], kinds: str, conditioning: Conditioning
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The policy on all rows that are asked for, step by step and network by network, for each kind of prompt."""
    denoiser = sampling.denoiser
    rows = torch.cat([rows for each in asked for rows in each.rows])
    x_t = torch.cat([_rows_of(each.step.x_t, some) for each in asked for some in each.some])
    times = torch.cat(
        [denoiser.path.network_time(each.step.t).expand(len(rows)) for each in asked for rows in each.rows]
    )
    x = torch.cat([x_t] * len(kinds))
    whole = [some for each in asked for some in each.some] == [None]
    repeated = conditioning if whole else conditioning[to_device(rows, x_t.device)]
    inputs = repeated.inputs(kinds) | denoiser.backbone.guidance_inputs(denoiser.guidance, x)
    if len(sampling.objectives) > 1:
        assert denoiser.batched is not None  # several LoRAs always share a forward
        networks = [n for each in asked for n, rows in zip(each.networks, each.rows, strict=True) for _ in rows]
        inputs["weights"] = denoiser.batched.route_of(networks * len(kinds), x.device)
    output, parameters = policy(x, to_device(times, x_t.device).repeat(len(kinds)), **inputs)
    if len(sampling.objectives) > 1:
        # A schedule whose objective has no weight in this batch has a gradient of 0: processes expect one of each.
        output = output + 0 * sum(value.sum() for each in parameters for value in each.values())
    return output, parameters


def _rows_of(x_t: Tensor, rows: Tensor | None) -> Tensor:
    return x_t if rows is None else x_t[to_device(rows, x_t.device)]
