"""The policy: a base UNet with one trainable LoRA, and variance offsets where the schedule is learned."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser, Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, VarianceSchedule, step_variance
from stepfuse.fuse.lora.layers import active_adapter, adapter_on_last_rows
from stepfuse.train.rollout import NoisedPairs, Step


class Policy(nn.Module):
    """The trainable module: a UNet with its LoRA, and the offsets of a learned schedule.

    Its forward returns the offsets too, so that a distributed wrapper sees every parameter used.
    """

    def __init__(self, unet: nn.Module, adapter: str, schedule: VarianceSchedule) -> None:
        super().__init__()
        self.unet = unet
        self.adapter = adapter
        self.offsets = nn.Parameter(schedule.offsets.clone()) if isinstance(schedule, LearnedSchedule) else None

    def forward(self, x: Tensor, times: Tensor, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        with active_adapter(self.unet, self.adapter):
            output = self.unet(x, times, return_dict=False, **inputs)[0]
        # not the parameter itself, which may be gone after this forward where parameters lie in parts (ZeRO-3)
        return output, None if self.offsets is None else self.offsets * 1

    def trainable_state(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """LoRA tensors in peft's names, and offsets.

        Args:
            values: of the trainable parameters, by their names in this module.
        """
        lora = {name.removeprefix("unet."): value for name, value in values.items() if name != "offsets"}
        state = dict(get_peft_model_state_dict(self.unet, state_dict=lora, adapter_name=self.adapter))
        return state if self.offsets is None else state | {"variance_offsets": values["offsets"]}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`."""
        lora = {name: value for name, value in state.items() if name != "variance_offsets"}
        set_peft_model_state_dict(self.unet, lora, adapter_name=self.adapter)
        if self.offsets is not None:
            with torch.no_grad():
                self.offsets.copy_(state["variance_offsets"])


def add_lora(unet: nn.Module, name: str, *, rank: int, alpha: int | None, targets: list[str], seed: int) -> None:
    """Put a fresh float32 LoRA on the UNet; its B is zero, so that it starts as the reference.

    Raises:
        ValueError: where no layer of the UNet matches the targets.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast(Any, unet).add_adapter(config, adapter_name=name)
    cast_training_params(unet, dtype=torch.float32)


@dataclass(frozen=True)
class LastRows:
    """Base and policy in one forward, without gradients; the LoRA is what it is at that moment (fuse's `Router`)."""

    unet: nn.Module
    adapter: str

    def route_of(self, adapters: Sequence[str | None], device: torch.device) -> int:
        """How many rows at the front are the base's.

        Raises:
            ValueError: for another adapter.
        """
        if strange := set(adapters) - {None, self.adapter}:
            raise ValueError(f"adapters {sorted(map(str, strange))}; expected {self.adapter!r} and the base only")
        return list(adapters).index(self.adapter) if self.adapter in adapters else len(adapters)

    def routed(self, route: int) -> AbstractContextManager[None]:
        return adapter_on_last_rows(self.unet, self.adapter, route)


def reference_schedule(schedule: VarianceSchedule) -> VarianceSchedule:
    """The schedule of the reference: the policy's, as it was before training."""
    return EtaSchedule(eta=schedule.eta) if isinstance(schedule, LearnedSchedule) else schedule


def step_gaussians(
    policy: nn.Module,
    denoiser: Denoiser,
    schedule: VarianceSchedule,
    steps: Sequence[Step | NoisedPairs],
    conditioning: Conditioning,
) -> list[tuple[Gaussian, Gaussian | None]]:
    """p_θ(x_s | x_t), with gradients, and p_ref(x_s | x_t) of stored steps, where they have the base's prediction.

    All of them from one forward. Of noised pairs the predictions with variance 1, and no guidance, as in pre-training.

    Args:
        policy: the `Policy`, wrapped or not.
        schedule: the initial schedule; learned offsets come from the policy.
        steps: of one batch, at least one; noised pairs by themselves.
        conditioning: of the batch.
    """
    if isinstance(steps[0], NoisedPairs):
        (pairs,) = steps
        return [_noise_gaussians(policy, denoiser, cast(NoisedPairs, pairs), conditioning)]
    taken = cast(Sequence[Step], steps)
    kinds = "-+" if denoiser.guidance == "full" else "+"
    x_t = torch.cat([step.x_t for step in taken])
    times = torch.cat([denoiser.path.network_time(step.t).expand(len(step.x_t)) for step in taken])
    everyone = conditioning[torch.arange(len(taken[0].x_t)).repeat(len(taken))] if len(taken) > 1 else conditioning
    output, offsets = policy(
        torch.cat([x_t] * len(kinds)).to(conditioning.positive.dtype),
        times.to(x_t.device).repeat(len(kinds)),
        **everyone.inputs(kinds),
    )
    parts = [part.chunk(len(taken)) for part in output.to(torch.float32).chunk(len(kinds))]
    current = replace(schedule, offsets=offsets) if isinstance(schedule, LearnedSchedule) else schedule
    return [_gaussians(denoiser, current, step, own) for step, own in zip(taken, zip(*parts, strict=True), strict=True)]


def _gaussians(
    denoiser: Denoiser, schedule: VarianceSchedule, step: Step, outputs: Sequence[Latents]
) -> tuple[Gaussian, Gaussian | None]:
    """Policy and reference of one step, from what the policy's network put out for each kind of prompt."""
    path = denoiser.path
    match denoiser.guidance:
        case "shared":
            assert step.negative is not None
            prediction = denoiser.guide(step.negative, outputs[0])
        case "full":
            prediction = denoiser.guide(*outputs)
        case _:
            prediction = outputs[0]
    variance = step_variance(schedule, path, step.t, step.s, step.x_t)
    ours = transition(path, step.x_t, prediction, step.t, step.s, variance)
    if step.reference is None:
        return ours, None
    fixed = step_variance(reference_schedule(schedule), path, step.t, step.s, step.x_t)
    return ours, transition(path, step.x_t, step.reference, step.t, step.s, fixed)


def _noise_gaussians(
    policy: nn.Module, denoiser: Denoiser, step: NoisedPairs, conditioning: Conditioning
) -> tuple[Gaussian, Gaussian]:
    dtype = conditioning.positive.dtype
    times = denoiser.path.network_time(step.times).to(step.x_t.device)
    both = conditioning[torch.arange(len(conditioning.positive)).repeat(2)]
    output, _ = policy(step.x_t.to(dtype), times, **both.inputs("+"))
    variance = step.x_t.new_ones(1, 1, 1, 1)
    return (
        Gaussian(mean=output.to(torch.float32), variance=variance),
        Gaussian(mean=step.reference, variance=variance),
    )
