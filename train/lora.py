"""The policy: a base model with one trainable LoRA, and the trainable parameters of its variance schedule."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Router
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import VarianceSchedule, step_variance
from stepfuse.fuse.lora.layers import active_adapter, adapter_on_last_rows
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.train.rollout import Sampling, Step

POLICY = Network.of("policy")  # stands for the policy among the branches of guidance
VARIANCE = "variance_"  # before the names of the schedule's parameters in a checkpoint


class Policy(nn.Module):
    """The trainable module: a network with its LoRA, and the trainable parameters of its schedule.

    Its forward returns these parameters too, so that a distributed wrapper sees every parameter used.
    """

    def __init__(self, backbone: Backbone, adapter: str, schedule: VarianceSchedule) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = backbone.network
        self.adapter = adapter
        self.schedule_names = tuple(schedule.trainable())
        for name, value in schedule.trainable().items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.register_load_state_dict_pre_hook(_rename_part)

    def forward(self, x: Tensor, times: Tensor, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with active_adapter(self.network, self.adapter):
            output = self.backbone.predict(x, times, inputs, network=self.network)
        # Not the parameters themselves: with ZeRO-3 they may be partitioned again after this forward.
        return output, {name: value * 1 for name, value in self.schedule_parameters().items()}

    def schedule_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in self.schedule_names}

    def trainable_state(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LoRA tensors in peft's names and the schedule's parameters, from trainable values by their names here."""
        lora = {
            name.removeprefix("network."): value for name, value in values.items() if name not in self.schedule_names
        }
        state = dict(get_peft_model_state_dict(self.network, state_dict=lora, adapter_name=self.adapter))
        return state | {VARIANCE + name: values[name] for name in self.schedule_names}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `trainable_state`."""
        lora, parameters = split_state(state)
        set_peft_model_state_dict(self.network, lora, adapter_name=self.adapter)
        with torch.no_grad():
            for name, parameter in self.schedule_parameters().items():
                parameter.copy_(parameters[name])


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LoRA tensors of a `trainable_state`, and the schedule's parameters by name."""
    lora = {name: value for name, value in state.items() if not name.startswith(VARIANCE)}
    return lora, {name.removeprefix(VARIANCE): value for name, value in state.items() if name not in lora}


def add_lora(network: nn.Module, name: str, *, rank: int, alpha: int | None, targets: list[str], seed: int) -> None:
    """Add a new float32 LoRA to a network; its B is zero, so that the policy starts as the base.

    Raises:
        ValueError: if no layer of the network matches the targets, and for a rank that a layer cannot have.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(targets))
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and rank % layer.groups and check_target_module_exists(config, path):
            raise ValueError(
                f"rank {rank} for {path}; expected a multiple of its {layer.groups} groups, or lora_target_modules "
                "without it"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast(Any, network).add_adapter(config, adapter_name=name)
    cast_training_params(network, dtype=torch.float32)


@dataclass(frozen=True)
class SharedForward(Router):
    """Base and policy in one forward pass, without gradients, with the LoRA's present weights."""

    network: nn.Module
    adapter: str

    def route_of(self, networks: Sequence[Network], device: torch.device) -> int:
        """The number of rows of the base, which come first; another network is a ValueError."""
        policy = Network.of(self.adapter)
        if others := set(networks) - {BASE, policy}:
            names = sorted(str(network.adapter) for network in others)
            raise ValueError(f"adapters {names}; expected {self.adapter!r} and the base only")
        return list(networks).index(policy) if policy in networks else len(networks)

    def routed(self, route: int) -> AbstractContextManager[None]:
        return adapter_on_last_rows(self.network, self.adapter, route)


def step_gaussians(
    policy: nn.Module, sampling: Sampling, steps: Sequence[Step], conditioning: Conditioning
) -> list[tuple[Gaussian, Gaussian | None]]:
    """p_θ(x_s | x_t), with gradients, and p_ref(x_s | x_t) of stored steps that have the base's prediction.

    All of them are computed in one forward pass.

    Args:
        policy: the `Policy`, wrapped or not.
        sampling: with the initial schedule, whose parameters come from the policy.
        steps: one or more steps of one batch.
    """
    denoiser, path = sampling.denoiser, sampling.denoiser.path
    branches = denoiser.guidance.branches([POLICY])
    kinds = "".join(branch.kind for branch in branches if branch.network == POLICY)  # the base's are stored
    x_t = torch.cat([step.x_t for step in steps])
    times = torch.cat([path.network_time(step.t).expand(len(step.x_t)) for step in steps])
    repeated = conditioning[torch.arange(len(steps[0].x_t)).repeat(len(steps))] if len(steps) > 1 else conditioning
    x = torch.cat([x_t] * len(kinds))
    inputs = repeated.inputs(kinds) | denoiser.backbone.guidance_inputs(denoiser.guidance, x)
    output, parameters = policy(x, times.to(x_t.device).repeat(len(kinds)), **inputs)
    parts = [part.chunk(len(steps)) for part in output.to(torch.float32).chunk(len(kinds))]
    schedule = sampling.schedule.with_parameters(parameters)
    gaussians = []
    for step, outputs in zip(steps, zip(*parts, strict=True), strict=True):
        stored = [] if step.negative is None else [step.negative]
        (prediction,) = denoiser.combine(branches, [*stored, *outputs])
        base = None if step.reference is None else _gaussian(path, schedule.base, step, step.reference)
        gaussians.append((_gaussian(path, schedule, step, prediction), base))
    return gaussians


def _gaussian(path: NoisePath, schedule: VarianceSchedule, step: Step, prediction: Latents) -> Gaussian:
    variance = step_variance(schedule, path, step.t, step.s, step.x_t)
    return transition(path, step.x_t, prediction, step.t, step.s, variance)


def _rename_part(policy: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Take the names of parameters in DeepSpeed's checkpoints of stepfuse 0.1, which began with the pipeline's part."""
    prefix = f"{cast(Policy, policy).backbone.part}."
    for name in [name for name in state if name.startswith(prefix)]:
        state["network." + name.removeprefix(prefix)] = state.pop(name)
